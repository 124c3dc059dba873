"""Graphs and a real engine of the tiny decoders, made once a session; the two libraries; when to skip."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest

from nbl_export.targets.base import BuildSettings
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.engine import TRT_RTX
from nbl_export.targets.tensorrt.library import LIBRARIES

from .exits import predicted_maps
from .static_tiny import HEAD, HIDDEN, LAYERS, SLOTS, maps_of, save_checkpoint

__all__ = ["ADA", "HOPPER", "PLAIN", "RTX", "SMALL", "checkpoint_of", "engine_of", "graph_of", "needs_rtx"]

RTX, PLAIN = LIBRARIES["trt-rtx"], LIBRARIES["trt"]
_PROBE = TRT_RTX.probe()
needs_rtx = pytest.mark.skipif(not _PROBE.available, reason=_PROBE.reason)
SMALL = BuildSettings(max_batch=2, prefill_chunk=16)
ADA = Gpu("NVIDIA RTX 4090", "8.9", (13, 0))
HOPPER = Gpu("NVIDIA H100", "9.0", (13, 0))
_ROOT = tempfile.TemporaryDirectory(prefix="trt-tiny-")


@functools.cache
def checkpoint_of(architecture: str) -> Path:
    """Never write to it."""
    return save_checkpoint(architecture, Path(_ROOT.name) / architecture)


@functools.cache
def graph_of(
    architecture: str, replaced: tuple[int, ...] = (), precision: str = "fp16", cache_length: int = SLOTS,
    exit_layer: tuple[int, int] | None = None,
) -> Path:  # fmt: skip
    """A directory with decoder.onnx, rewritten as for a run; with an exit layer and W if they are given. Never write
    to it."""
    from nbl_export.graph.passes.tail import keep_last_token
    from nbl_export.methods.rewrite import rewrite
    from nbl_export.targets.tensorrt import export as static

    root = Path(tempfile.mkdtemp(dir=_ROOT.name))
    static.build(checkpoint_of(architecture), root / "original", precision, max_seq_len=cache_length)
    keep_last_token(root / "original")
    maps = maps_of(replaced) if exit_layer is None else predicted_maps(*exit_layer, 2 * HEAD, HIDDEN, LAYERS)
    rewrite(root / "original", root / "model", maps)
    return root / "model"


@functools.cache
def engine_of() -> Path:
    """A real fp16 engine of the Llama without its middle layer's attention. Never write to it."""
    out = Path(_ROOT.name) / "engine" / "model"
    build_engine(RTX, graph_of("llama", (1,)), out, SMALL)
    return out
