"""Targets: one package an engine, and a protocol (`base.Engine`). Differences between targets are data.

No package imports another target's package; `export`, `tokenizer`, `checks` and the like serve all of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path

from nbl_export.errors import UsageError
from nbl_export.records.destinations import is_destination
from nbl_export.targets.base import Engine

__all__ = ["ENGINES", "all_targets", "exporter_of", "load_engine", "owner_of"]

# Targets by the value of --engine.
ENGINES = {
    "ort": "nbl_export.targets.onnx.engine:ORT",
    "openvino": "nbl_export.targets.openvino.engine:OPENVINO",
    "trt": "nbl_export.targets.tensorrt.engine:TRT",
    "trt-rtx": "nbl_export.targets.tensorrt.engine:TRT_RTX",
}
# Targets by the values of --engine and --provider, apart from the CPU.
_WITH_PROVIDERS = {("ort", "cuda"): "nbl_export.targets.onnx.gpu:ORT_CUDA"}


@functools.cache
def load_engine(name: str, provider: str = "cpu") -> Engine:
    """The target of that name, for an execution provider of ONNX Runtime; loads no engine's libraries.

    Raises:
        UsageError: there is no such engine or provider.
    """
    if name not in ENGINES:
        served = f"; --for {name} makes a model for it" if is_destination(name) else ""
        raise UsageError(f"unknown engine {name!r}; engines are {', '.join(ENGINES)}{served}")
    place = ENGINES[name] if provider == "cpu" else _WITH_PROVIDERS.get((name, provider))
    if place is None:
        known = [other for engine, other in _WITH_PROVIDERS if engine == name]
        if not known:
            raise UsageError(f"--provider is for engine ort, not for {name}")
        raise UsageError(
            f"unknown provider {provider!r}; --provider is one of {', '.join(['cpu', *known])}, and --engine trt is "
            "TensorRT itself"
        )
    module, _, attribute = place.partition(":")
    found: Engine = getattr(importlib.import_module(module), attribute)
    return found


def owner_of(path: Path) -> Engine | None:
    """The target that runs a deployable directory; None if there is none."""
    return next((target for target in all_targets() if target.owns(path)), None)


def exporter_of(source: str) -> Engine:
    """The first target that takes the graphs of a decoder source."""
    return next(target for target in all_targets() if source in target.capabilities.sources)


def all_targets() -> Iterator[Engine]:
    """Every target, and every execution provider of a target that has some."""
    for name in ENGINES:
        yield load_engine(name)
    for name, provider in _WITH_PROVIDERS:
        yield load_engine(name, provider)
