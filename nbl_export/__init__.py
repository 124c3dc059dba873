"""nbl-export: Neural Block Linearization of decoder LLMs, from checkpoint to a verified engine.

    import nbl_export as nbl

    run = nbl.export(MODEL, DIR, layers=8)     the main job; nbl.open(DIR) opens a run that is there
    run.loss, run.speed                        values with their intervals
    nbl.estimate(MODEL)                        what the main job will take

`nbl_export.api` has these names. They are loaded at first use: importing this package loads neither torch nor any
engine. `nbl_export.cli` is the command line.

The import turns off telemetry of ONNX Runtime, its GenAI, huggingface_hub and nncf in this process, unless the
environment says otherwise, and that of OpenVINO, for which OpenVINO has no environment variable.
"""

import os
import sys

if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()]:  # `python -m` would import from the working directory
    del sys.path[0]

from typing import TYPE_CHECKING, Any

from nbl_export.version import __version__

if TYPE_CHECKING:
    from nbl_export.api import Estimate, NblError, Run, estimate, export, open

__all__ = ["Estimate", "NblError", "Run", "__version__", "estimate", "export", "open"]

for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "NNCF_CI"):  # read when the libraries are loaded
    os.environ.setdefault(_switch, "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its importers go on without it

if not TYPE_CHECKING:  # with it, every name would be known to a type checker

    def __getattr__(name: str) -> Any:
        """A name of `api`, which is imported now."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from nbl_export import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "_switch", "os", "sys"})
