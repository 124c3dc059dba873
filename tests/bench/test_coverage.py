"""bench/coverage.py: its raw result is that of today's intervals, which hold the mean as often as is claimed."""

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
    spec = importlib.util.spec_from_file_location("coverage_of_windows", BENCH / "coverage.py")
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


def test_93_of_100_intervals_hold_the_mean_of_what_is_not_skewed(coverage: Any) -> None:
    asked = {(w, c) for w in coverage.WINDOWS for c in coverage.CORRELATIONS}
    for kind in ("normal", "heavy tails (g-and-h, h 0.15)"):
        rows = [row for row in ROWS if row["differences"] == kind]
        assert {(row["windows"], row["correlation"]) for row in rows} == asked
        assert min(row["held"]["this"] for row in rows) >= 0.93


def test_no_other_method_does(coverage: Any) -> None:
    """So the simulation can tell."""
    for name in set(coverage.METHODS) - {"this"}:
        assert min(row["held"][name] for row in ROWS) < 0.9
