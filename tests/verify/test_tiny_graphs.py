"""Graphs of every architecture, original and NBL, go through all checks of `verify`, as in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.records.results import CheckResult
from nbl_export.targets import exporter_of

from ..tiny import EVERY, VARIANTS, cases, made_by
from ..verifying import ENGINES, verify_tiny

pytestmark = pytest.mark.job

Checkpoint = Callable[[str], Path]
Case = tuple[str, str, str]  # architecture, source, precision

SHOWN: list[Case] = [
    *((a, "genai", p) for p in ("fp32", "int4") for a in made_by("genai")),
    *((a, "mobius", "fp32") for a in made_by("mobius")),
    ("mistral-window", "static", "bf16"), ("qwen2", "static", "int4"),
    ("gemma3", "openvino", "fp32"), ("llama", "openvino", "int4"), ("exaone4", "openvino", "fp32"),
]  # fmt: skip
# Refused: mobius loses biases of MLPs; a trace and the static form have one rotary table.
REFUSED = {("llama-bias", "mobius"), ("llama-bias", "static"), ("phi3-long", "openvino"), ("phi3-long", "static")}
# In half precision, mobius fuses no GroupQueryAttention here, the operator that is repaired. Verification fails.
# Beyond its short context, mobius' Phi-3 keeps the rotary table of the short one. Verification fails.
NOT_REPAIRED = {("gemma3", "mobius", "fp16"), ("phi3-long", "mobius", "fp32"), ("phi3-long", "mobius", "fp16")}
ALL: list[Case] = [
    (architecture, source, precision)
    for source in ENGINES
    for precision in exporter_of(source).capabilities.sources[source]
    for architecture in (*EVERY, *VARIANTS)
    if architecture not in EVERY or architecture in made_by(source)
    if (architecture, source) not in REFUSED and (architecture, source, precision) not in NOT_REPAIRED
]


def test_every_architecture_and_source_is_shown() -> None:
    assert {a for a, *_ in SHOWN} == set(EVERY) and {s for _, s, _ in SHOWN} == set(ENGINES) and set(SHOWN) <= set(ALL)


def check(results: list[CheckResult], source: str, precision: str) -> None:
    """All checks are there, of both graphs, and all passed."""
    assert not [r for r in results if not r.passed]
    rounds = source != "static" and (precision in ("int8", "int4") or (source == "openvino" and precision == "fp16"))
    wanted = {
        *((check, subject) for check in ("structure", "text", "last_token") for subject in ("original", "nbl")),
        ("exporter", "original"), ("original", "original"), ("nbl", "nbl"),
        *([("shipped", "nbl")] if rounds else []),
    }  # fmt: skip
    assert {(r.check, r.subject) for r in results} == wanted


@pytest.mark.parametrize(("architecture", "source", "precision"), cases(SHOWN))
def test_all_checks_pass(
    architecture: str, source: str, precision: str, checkpoint: Checkpoint, exported: Any, tmp_path: Path
) -> None:
    original = None if source == "static" else exported(architecture, source, precision)
    found = verify_tiny(checkpoint(architecture), source, precision, tmp_path, exported=original)
    check(found, source, precision)


@pytest.mark.fuzz
@pytest.mark.parametrize("replaced", [(0, 2), (1,)], ids=str)
@pytest.mark.parametrize(("architecture", "source", "precision"), ALL)
def test_all_checks_pass_on_every_graph(
    architecture: str, source: str, precision: str, replaced: tuple[int, ...], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    check(verify_tiny(checkpoint(architecture), source, precision, tmp_path, replaced), source, precision)
