"""Engines that run a decoder graph (`base.Engine`). Differences between engines are data (`base.Capabilities`)."""

from __future__ import annotations

import importlib

from nbl_export.errors import UsageError
from nbl_export.targets.base import Engine

__all__ = ["ENGINES", "RUNNERS", "load_engine"]

ENGINES = {
    "ort": "nbl_export.targets.onnx.engine:ORT",
    "openvino": "nbl_export.targets.openvino.engine:OPENVINO",
    "trt": "nbl_export.targets.tensorrt.engine:TRT",
    "trt-rtx": "nbl_export.targets.tensorrt.engine:TRT_RTX",
}


# Engines that run files of `convert`, and make no decoders of a job.
RUNNERS = {"llama.cpp": "nbl_export.targets.gguf.engine:LLAMA_CPP"}


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
        from nbl_export.targets.onnx.gpu import GpuEngine

        return GpuEngine(provider)
    module, _, attribute = known[name].partition(":")
    found: Engine = getattr(importlib.import_module(module), attribute)
    return found
