"""Intervals of windows: the raw result is that of today, and the mean is held as often as is claimed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
ROWS = json.loads((BENCH / "results" / "coverage-perplexity.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture(scope="module")
def coverage() -> Any:
    spec = importlib.util.spec_from_file_location("window_intervals", BENCH / "window_intervals.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "stored", [row for row in ROWS if row["windows"] == 16 and row["correlation"] == 0.67], ids=str
)
def test_the_raw_result_is_that_of_todays_intervals(coverage: Any, stored: dict[str, Any]) -> None:
    anew = coverage.row(stored["differences"], stored["windows"], stored["correlation"])
    assert not coverage.differs(stored, anew), anew


def test_how_often_the_mean_is_held_is_what_docs_say(coverage: Any) -> None:
    """Nominal are 95%. Skewed windows that correlate strongly give less, which docs/method.md states."""
    asked = {(w, c) for w in coverage.WINDOWS for c in coverage.CORRELATIONS}
    held: dict[str, list[float]] = {}
    for kind in ("normal", "heavy tails (g-and-h, h 0.15)", "skewed (lognormal, sigma 0.5)"):
        rows = [row for row in ROWS if row["differences"] == kind]
        assert {(row["windows"], row["correlation"]) for row in rows} == asked
        for row in rows:
            worst = kind.startswith("skewed") and row["correlation"] == max(coverage.CORRELATIONS)
            held.setdefault("skewed" if worst else "others", []).append(row["held"]["this"])
    assert min(held["others"]) >= 0.94
    page = (BENCH.parent / "docs" / "method.md").read_text(encoding="utf-8")
    assert f"correlate by 0.67 gave {min(held['skewed']):.0%} to {max(held['skewed']):.0%}" in page


def test_no_other_method_does(coverage: Any) -> None:
    """So the simulation can tell."""
    for name in set(coverage.METHODS) - {"this"}:
        assert min(row["held"][name] for row in ROWS) < 0.9
