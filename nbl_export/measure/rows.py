"""Figures of bench.json: a row for each test and variant, a ratio for each test and pair of variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.measure.paired import paired_ratio
from nbl_export.records.results import Scenario, Timing

__all__ = ["read_timings", "speed_ratios", "speed_rows", "spoken_ratio", "spoken_test"]


def read_timings(bench: Mapping[str, Any]) -> list[Timing]:
    """The timings of bench.json, in the order of the runs.

    Raises:
        CorruptError: bench.json does not record the load of each run.
    """
    if not all("loads" in t for t in bench.get("timings", ())):
        raise CorruptError("bench.json does not record the load of each round; delete it and run nbl-export bench DIR")
    return [
        Timing(
            Scenario(t["kind"], t["tokens"], t["depth"], t["batch"], t["threads"]),
            t["variant"],
            tuple(t["samples_ns"]),
            tuple(t["loads"]),
            tuple(t.get("first_token_ns", ())),
            tuple(tuple(run) for run in t.get("token_ns", ())),
            tuple(t.get("energy_uj", ())),
        )
        for t in bench.get("timings", ())
    ]


def speed_rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Tokens per second, latency and energy of every test and variant.

    ttft_seconds: median. tpot_seconds: p50, p95 and p99. Latency and energy are None if they were not measured.
    """
    return [_row(t) for t in timings]


def _row(timing: Timing) -> dict[str, Any]:
    tpot = timing.tpot_ns
    return {
        **_facts(timing.scenario),
        "variant": timing.variant,
        "tokens_per_second_median": timing.median,
        "tokens_per_second_mean": timing.mean,
        "tokens_per_second_stdev": timing.stdev,
        "samples": list(timing.tokens_per_second),
        "loads": list(timing.loads),
        "ttft_seconds": None if timing.ttft_ns is None else timing.ttft_ns / 1e9,
        "tpot_seconds": tpot and {name: ns / 1e9 for name, ns in tpot.items()},
        "joules_per_token": timing.joules_per_token,
    }


def _facts(scenario: Scenario) -> dict[str, Any]:
    return {"test": scenario.test, **dataclasses.asdict(scenario)}


def speed_ratios(
    timings: Sequence[Timing], base: str | None = "original", *, until_narrow: bool
) -> list[dict[str, Any]]:
    """Tokens/s of every other variant divided by the base's, one entry for each test that both ran, in run order.

    Args:
        until_narrow: whether `rounds.Rule` ended the rounds, not a number that was fixed beforehand.

    Raises:
        CorruptError: the two variants have different rounds.
    """
    if base is None:
        return []
    found = {(t.scenario, t.variant): t for t in timings}
    own = [t for t in timings if t.variant != base and (t.scenario, base) in found]
    return [_ratio(found[t.scenario, base], t, until_narrow=until_narrow) for t in own]


def _ratio(base: Timing, own: Timing, *, until_narrow: bool) -> dict[str, Any]:
    """Pair the rounds: round k of both variants ran one after the other, on the same load."""
    scenario, counts = own.scenario, (len(base.samples_ns), len(own.samples_ns))
    if base.loads != own.loads or counts != (len(own.loads),) * 2:
        names = {"original": "the original", "nbl": "NBL"}
        raise CorruptError(
            f"bench.json has {counts[0]} rounds of {names.get(base.variant, base.variant)} and {counts[1]} of "
            f"{names.get(own.variant, own.variant)} for {scenario.test} at depth {scenario.depth}, not of the same "
            "loads; run the bench stage again"
        )
    found = paired_ratio(base.samples_ns, own.samples_ns, own.loads, until_narrow=until_narrow)
    return {
        **_facts(scenario),
        "variant": own.variant,
        "base": base.variant,
        **dataclasses.asdict(found),
        "interval": found.interval,
        "verdict": found.verdict,
        "text": f"{spoken_ratio(found.ratio)}×" if found.verdict in ("faster", "slower") else found.verdict,
    }


def spoken_ratio(ratio: float) -> str:
    """Two decimal places; three if two would give 1.00."""
    return f"{ratio:.2f}" if abs(ratio - 1) >= 0.005 else f"{ratio:.3f}"


def spoken_test(row: Mapping[str, Any], *, swept: bool = False) -> str:
    """A test in words: "pp512 at depth 2048, 4 sequences"; `swept` adds the number of threads."""
    words = row["test"] + (f" at depth {row['depth']}" if row["depth"] else "")
    words += f", {row['batch']} sequences" if row.get("batch", 1) > 1 else ""
    if swept and row.get("threads"):
        words += f", {row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    return words
