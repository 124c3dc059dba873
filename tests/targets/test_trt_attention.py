"""Attention is fused if the library has a kernel, and decomposed on purpose if it has none; engine.json says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.tensorrt import build
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.messages import Message
from nbl_export.targets.tensorrt.network import ParsedNetwork
from nbl_export.targets.tensorrt.record import read_record

from ..static_tiny import save_checkpoint
from ..trt_tiny import RTX, graph_of, needs_rtx

pytestmark = pytest.mark.trt

ONE = BuildSettings(1, 16)


def tiny_graph(tmp_path: Path, **changes: int) -> Path:
    checkpoint = save_checkpoint("llama", tmp_path / "checkpoint", **changes)
    static.build(checkpoint, tmp_path / "graph", "fp16", max_seq_len=32)
    return tmp_path / "graph"


@pytest.fixture
def without_kernel(tmp_path: Path) -> Path:
    """The graph of a tiny Llama that RTX has no fused attention kernel for: heads of 8."""
    return tiny_graph(tmp_path, head_dim=8)


@needs_rtx
def test_attention_without_a_kernel_is_decomposed(
    without_kernel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = build_engine(RTX, without_kernel, tmp_path / "e", ONE)
    assert record.attention == read_record(tmp_path / "e").attention == "decomposable"
    *before, told = [r.getMessage() for r in caplog.records if r.name == build.__name__]
    assert len(before) == 1
    assert "graph: attention may be decomposed" in told and "not supported by a dedicated kernel" in told


@needs_rtx
def test_attention_with_a_kernel_is_fused_in_one_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    builds: list[str] = []
    monkeypatch.setattr(build, "allow_decomposing", lambda parsed: builds.append("decomposed"))
    assert build_engine(RTX, graph_of("llama", (1,)), tmp_path / "e", ONE).attention == "fused"
    assert not builds and not caplog.records


@needs_rtx
def test_what_builds_in_no_way_says_every_reason(
    without_kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "allow_decomposing", lambda parsed: True)  # and changes nothing
    reason = r"does not build graph: .*dedicated kernel.*; and before: .*dedicated kernel"
    with pytest.raises(NblError, match=reason):
        build_engine(RTX, without_kernel, tmp_path / "e", ONE)
    assert not (tmp_path / "e").exists()


SKIPPED = "Skipping tactic 0 due to insufficient memory on requested size of 2598728448"
NO_KERNEL_SAID = "Attention operation was not supported by a dedicated kernel"


def refusing(monkeypatch: pytest.MonkeyPatch, *reasons: str) -> list[tuple[int, int, int]]:
    """The builder refuses for each reason in turn; the value lists decode's tokens."""
    asked: list[tuple[int, int, int]] = []
    real = build._attempt

    def attempt(parsed: ParsedNetwork, log: Any, profiles: Any, *rest: Any) -> Any:
        asked.append(profiles[-1].tokens)
        if len(asked) <= len(reasons):
            return build._refusal([Message("ERROR", reasons[len(asked) - 1])])
        return real(parsed, log, profiles, *rest)

    monkeypatch.setattr(build, "_attempt", attempt)
    return asked


@needs_rtx
@pytest.mark.parametrize(("refusals", "attention", "tokens"), [(1, "fused", (1, 1, 2)), (2, "decomposable", (1, 1, 1))])
def test_what_a_builder_refuses_is_tried_in_the_next_way(
    refusals: int, attention: str, tokens: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """The real builder of TensorRT-RTX then takes it."""
    asked = refusing(monkeypatch, *[NO_KERNEL_SAID] * refusals)
    record = build_engine(RTX, graph_of("llama", (1,)), tmp_path / "e", ONE)
    assert (record.attention, record.profiles[1].tokens) == (attention, tokens)
    assert asked == [(1, 1, 1), (1, 1, 2), (1, 1, 1)][: len(asked)]
    told = [r.getMessage() for r in caplog.records if r.name == build.__name__]
    assert len(told) == refusals and all(NO_KERNEL_SAID in text for text in told)
    assert "all 96 slots for each of 4 query heads, 2 times the cache of a layer" in told[0]


@needs_rtx
@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 9 bytes.)", "too little memory .*OutOfMemory.* key max_batch"),
        ("No space left on device", "does not build model: No space left"),
    ],
)
def test_a_refusal_for_another_reason_is_not_tried_again(
    reason: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = refusing(monkeypatch, reason)
    with pytest.raises(NblError, match=message):
        build_engine(RTX, graph_of("llama", (1,)), tmp_path / "e", ONE)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("said", "of_attention", "why"),
    [
        (["E wrap_attention_op_in_kgen.cpp:1909: Expected 3 live inputs, got 4"], True, "live inputs"),
        (["E Could not find any implementation for node {ForeignNode[a...b]}."], True, "Could not find"),
        (
            [f"W {SKIPPED}", "E Could not find any implementation for node x"],
            True,
            f"node x (1 times it said: {SKIPPED})",
        ),
        ([f"E {SKIPPED}", f"E {NO_KERNEL_SAID}"], True, NO_KERNEL_SAID),
        (["W out of memory", "E Could not find any implementation for node x"], True, "Could not find"),
        (["E Error Code 2: OutOfMemory", "E Could not find any implementation for node x"], False, "too little memory"),
        (["E Error Code 9: no such thing"], False, "no such thing"),
        ([f"W {SKIPPED}"], False, SKIPPED),
        ([], False, "no reason"),
    ],
)
def test_a_refusal_is_read_from_errors_alone(said: list[str], of_attention: bool, why: str) -> None:
    """A builder skips tactics that find too little memory, and goes on (issue 955 of TensorRT-Model-Connect)."""
    found = build._refusal([Message({"E": "ERROR", "W": "WARNING"}[text[0]], text[2:]) for text in said])
    assert found.of_attention is of_attention and why in found.why
