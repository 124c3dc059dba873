"""Engines: what runs a decoder graph. Differences between them are data (`engines.base.Capabilities`).

An engine is a module, or an object in one, with CAPABILITIES, probe() and probe_run() (does it build, does it run
here), default_threads(), open_runner(directory, threads) for what ships, open_checked(directory, threads) and
open_graph(directory, spec, file) for what is verified. A static one (see `Capabilities`) also has library_version(),
check_model(spec, precision) and build(source, out, settings, progress).
"""

from __future__ import annotations

import importlib
from typing import Any

from nbl_export.errors import UsageError

__all__ = ["ENGINES", "load_engine"]

ENGINES = {
    "ort": "nbl_export.engines.ort",
    "trt": "nbl_export.engines.tensorrt:TRT",
    "trt-rtx": "nbl_export.engines.tensorrt:TRT_RTX",
}


def load_engine(name: str, provider: str = "cpu") -> Any:
    """The engine of that name, for an execution provider of ONNX Runtime; loads none of its libraries.

    Raises:
        UsageError: there is no such engine or provider.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; engines are {', '.join(ENGINES)}")
    if provider != "cpu":
        if name != "ort":
            raise UsageError(f"--provider is for engine ort, not for {name}")
        from nbl_export.engines.ort_gpu import GpuEngine

        return GpuEngine(provider)
    module, _, attribute = ENGINES[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found
