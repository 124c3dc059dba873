"""nbl-export: Neural Block Linearization of decoder LLMs, from checkpoint to a verified engine.

Importing this package loads neither torch nor any engine; `nbl_export.cli` is the command line. The import turns off
telemetry of ONNX Runtime, its GenAI, huggingface_hub and nncf in this process, unless the environment says otherwise,
and that of OpenVINO, for which OpenVINO has no environment variable.
"""

import os
import sys

__all__ = ["__version__"]

for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "NNCF_CI"):  # read when the libraries are loaded
    os.environ.setdefault(_switch, "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its importers go on without it

__version__ = "0.1.0"
