"""What TensorRT-RTX's builder says of an 8B decoder, without a GPU: success, size of the plan, scratch memory.

A plan is never opened: its size, and the builder's own messages, are all that is read.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.methods.rewrite import rewrite
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.tensorrt import build
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.record import EngineRecord

from ..static_tiny import save_checkpoint
from ..trt_tiny import RTX, needs_rtx

pytestmark = [pytest.mark.trt, needs_rtx]

QUERIES, KEYS, HEAD = 32, 8, 128  # of Llama-3-8B
HEADS = {"num_attention_heads": QUERIES, "num_key_value_heads": KEYS, "head_dim": HEAD}
SHAPES = {**HEADS, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 8192}
CHUNK = 512


def built(
    tmp_path: Path, slots: int, rows: int, caplog: pytest.LogCaptureFixture, **shapes: int
) -> tuple[EngineRecord, list[int], int]:
    """The engine of the last-token graph, scratch bytes of each profile, and bytes of the graph's weights."""
    original, model = tmp_path / "original", tmp_path / "model"
    static.build(save_checkpoint("mistral", tmp_path / "checkpoint", **shapes), original, "bf16", max_seq_len=slots)
    keep_last_token(original)
    rewrite(original, model, {})
    caplog.set_level("DEBUG")
    record = build_engine(RTX, model, tmp_path / "engine", BuildSettings(rows, CHUNK))
    said = (re.search(r"Max Scratch Memory: (\d+) bytes", text) for text in caplog.messages)
    return record, [int(found.group(1)) for found in said if found], (model / "decoder.onnx.data").stat().st_size


@pytest.mark.parametrize(("slots", "rows", "copied"), [(2048, 1, 0), (24_064, 1, 0), (24_065, 1, 1), (24_065, 2, 2)])
def test_decode_of_24_064_slots_copies_no_keys(
    slots: int, rows: int, copied: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One slot more, and keys and values of each row are copied for each query head; with few tokens, always."""
    _, (prefill, decode), _ = built(tmp_path, slots, rows, caplog, **HEADS)
    copies = 2 * QUERIES * slots * HEAD * 2
    assert decode == pytest.approx(copied * copies, rel=0.02, abs=9e6)
    assert prefill >= max(copied, 1) * copies
    told = [r.getMessage() for r in caplog.records if r.name == build.__name__]
    assert len(told) == bool(copied)
    assert not copied or f"32 query heads, 4 times the cache of a layer, in {copied * copies / 1e6:,.0f} MB" in told[0]


@pytest.mark.large
def test_three_layers_of_8b_build(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """6 GB of memory, 8 GB of disk, 40 seconds of a core. Both profiles share the weights."""
    record, scratch, weights = built(tmp_path, 2048, 1, caplog, **SHAPES)
    assert (record.attention, record.precision) == ("fused", "bf16")
    assert 1.4e9 < weights <= record.plan_bytes < 1.01 * weights + 10e6
    prefill, decode = scratch
    assert decode < 12e6 and prefill < 300e6
