"""Engines that run a decoder graph (`base.Engine`). Differences between engines are data (`base.Capabilities`)."""

from __future__ import annotations

import importlib

from nbl_export.engines.base import Engine
from nbl_export.errors import UsageError

__all__ = ["ENGINES", "RUNNERS", "load_engine"]

ENGINES = {
    "ort": "nbl_export.engines.ort.engine:ORT",
    "openvino": "nbl_export.engines.openvino.engine:OPENVINO",
    "trt": "nbl_export.engines.tensorrt.engine:TRT",
    "trt-rtx": "nbl_export.engines.tensorrt.engine:TRT_RTX",
}


# Engines that run files of `convert`, and make no decoders of a job.
RUNNERS = {"llama.cpp": "nbl_export.engines.llama_cpp.engine:LLAMA_CPP"}


def load_engine(name: str, provider: str = "cpu") -> Engine:
    """The engine of that name, for an execution provider of ONNX Runtime; loads no engine's libraries.

    Raises:
        UsageError: there is no such engine or provider.
    """
    known = {**ENGINES, **RUNNERS}
    if name not in known:
        raise UsageError(f"unknown engine {name!r}; engines are {', '.join(ENGINES)}")
    if provider != "cpu":
        if name != "ort":
            raise UsageError(f"--provider is for engine ort, not for {name}")
        from nbl_export.engines.ort.gpu import GpuEngine

        return GpuEngine(provider)
    module, _, attribute = known[name].partition(":")
    found: Engine = getattr(importlib.import_module(module), attribute)
    return found
