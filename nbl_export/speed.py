"""bench.json -> figures: a row for each test and variant, a ratio for each test and pair of variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.paired import paired_ratio
from nbl_export.records import Scenario, Timing

__all__ = ["read_timings", "speed_ratios", "speed_rows", "spoken_ratio", "spoken_test"]


def read_timings(bench: Mapping[str, Any]) -> list[Timing]:
    """The timings of bench.json, in the order they ran; also of one that knew neither batches nor lists of threads."""
    of_all = bench.get("threads")
    return [
        Timing(
            Scenario(t["kind"], t["tokens"], t["depth"], t.get("batch", 1), t.get("threads", _only(of_all))),
            t["variant"],
            tuple(t["samples_ns"]),
            tuple(t.get("first_token_ns", ())),
            tuple(tuple(run) for run in t.get("token_ns", ())),
            tuple(t.get("energy_uj", ())),
        )
        for t in bench.get("timings", ())
    ]


def _only(threads: Any) -> int | None:
    return threads if isinstance(threads, int) else None


def speed_rows(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Tokens per second of every test and variant, and what is known of latency and energy.

    ttft_seconds: median. tpot_seconds: p50, p95 and p99. All of them None where they were not measured.
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
        "ttft_seconds": None if timing.ttft_ns is None else timing.ttft_ns / 1e9,
        "tpot_seconds": tpot and {name: ns / 1e9 for name, ns in tpot.items()},
        "joules_per_token": timing.joules_per_token,
    }


def _facts(scenario: Scenario) -> dict[str, Any]:
    return {"test": scenario.test, **dataclasses.asdict(scenario)}


def speed_ratios(timings: Sequence[Timing], base: str | None = "original") -> list[dict[str, Any]]:
    """Tokens/s of every other variant over the base's, one entry a test that both ran, in the order they ran.

    Raises:
        CorruptError: the two have different numbers of rounds.
    """
    if base is None:
        return []
    found = {(t.scenario, t.variant): t.samples_ns for t in timings}
    return [
        _ratio(t.scenario, base, t.variant, found[t.scenario, base], t.samples_ns)
        for t in timings
        if t.variant != base and (t.scenario, base) in found
    ]


def _ratio(
    scenario: Scenario, base: str, variant: str, base_ns: tuple[int, ...], own_ns: tuple[int, ...]
) -> dict[str, Any]:
    """Round by round: round k of both ran one after the other."""
    if len(base_ns) != len(own_ns):
        name = "NBL" if variant == "nbl" else variant
        raise CorruptError(
            f"bench.json has {len(base_ns)} rounds of {'the original' if base == 'original' else base} and "
            f"{len(own_ns)} of {name} for {scenario.test} at depth {scenario.depth}; run the bench stage again"
        )
    found = paired_ratio(base_ns, own_ns)
    return {
        **_facts(scenario),
        "variant": variant,
        "base": base,
        **dataclasses.asdict(found),
        "interval": found.interval,
        "verdict": found.verdict,
        "text": f"{spoken_ratio(found.ratio)}×" if found.verdict in ("faster", "slower") else found.verdict,
    }


def spoken_ratio(ratio: float) -> str:
    """Two digits behind the point, three where two would say 1.00."""
    return f"{ratio:.2f}" if abs(ratio - 1) >= 0.005 else f"{ratio:.3f}"


def spoken_test(row: Mapping[str, Any], *, swept: bool = False) -> str:
    """A test in words: pp512 at depth 2048, 4 sequences; with `swept` the number of threads too."""
    words = row["test"] + (f" at depth {row['depth']}" if row["depth"] else "")
    words += f", {row['batch']} sequences" if row.get("batch", 1) > 1 else ""
    if swept and row.get("threads"):
        words += f", {row['threads']} thread{'' if row['threads'] == 1 else 's'}"
    return words
