"""Rows that hold the NBL graphs against everybody of equal weight bits, and the table of them."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["against", "print_table"]

_FEWEST_PAIRS = 3  # as in the report: a range of fewer says nothing


def against(rows: Sequence[Mapping[str, Any]], timings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each NBL graph, test and other decoder of equal nominal bits: the ratio of each round's pair.

    verdict: "ahead" or "behind" where all pairs say so, else "no difference"; "too few rounds" under three.
    """
    speeds = {(t["name"], t["test"]): t["tokens_per_second"] for t in timings}
    found = []
    for ours, other in _pairs(rows):
        for test in dict.fromkeys(t["test"] for t in timings):
            if (ours["name"], test) not in speeds or (other["name"], test) not in speeds:
                continue
            pairs = zip(speeds[ours["name"], test], speeds[other["name"], test], strict=True)
            ratios = [a / b for a, b in pairs]
            found.append({
                "name": ours["name"], "other": other["name"], "test": test, "weight_bits": ours["weight_bits"],
                "ratio_median": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)],
                "verdict": _verdict(ratios),
            })  # fmt: skip
    return found


def _pairs(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for ours in rows:
        if ours["peer"] == "nbl-export" and ours["name"].endswith("/model"):
            for other in rows:
                if other is not ours and other["weight_bits"] == ours["weight_bits"]:
                    yield ours, other


def _verdict(ratios: Sequence[float]) -> str:
    if len(ratios) < _FEWEST_PAIRS:
        return "too few rounds"
    if min(ratios) > 1:
        return "ahead"
    return "behind" if max(ratios) < 1 else "no difference"


def print_table(result: Mapping[str, Any]) -> None:
    """Speeds of everybody, then the comparisons, for people."""
    out = sys.stderr
    tests = list(dict.fromkeys(t["test"] for t in result["timings"]))
    medians = {(t["name"], t["test"]): t["tokens_per_second_median"] for t in result["timings"]}
    print(f"\n{'tokens/s':38}{'bits':>6}" + "".join(f"{t:>10}" for t in tests), file=out)
    for row in sorted(result["contenders"], key=lambda r: -r["weight_bits"]):
        cells = "".join(f"{medians.get((row['name'], t), float('nan')):10.1f}" for t in tests)
        print(f"{row['name']:38}{row['bits_per_weight']:6.2f}{cells}", file=out)
    print(f"\n{'at equal weight bits':60}{'ratio':>8}  range", file=out)
    for r in result["against"]:
        low, high = r["ratio_range"]
        pair = f"{r['test']} {r['name']} : {r['other']}"
        print(f"{pair:60}{r['ratio_median']:8.2f}  {low:.2f}..{high:.2f} {r['verdict']}", file=out)
    for a in result["absent"]:
        print(f"absent: {a['name']}: {a['reason']}", file=out)
