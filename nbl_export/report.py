"""What the other stages found -> one page for people, the same as Markdown, the same as JSON.

    nbl.json, verify.json, bench.json -> summarize -> report.json
                                             └─► present -> Page -> report.html, report.md

Everything both readers see is text by the time it is in a `Page`; the template and `markdown` only lay it out.
"""

from __future__ import annotations

import importlib.resources
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nbl_export import plots
from nbl_export.artifacts import write_json
from nbl_export.errors import CorruptError
from nbl_export.records import Scenario, Timing

__all__ = ["render", "summarize"]

_FEWEST_PAIRS = 3  # below this a range of pairs says nothing
_COPIED = ("model", "options", "command", "versions", "calibration", "num_layers", "replaced_layers", "tap", "select")
_VARIANTS = ("original", "nbl")


def render(manifest: dict[str, Any], verify: dict[str, Any], bench: dict[str, Any] | None, out: Path) -> dict[str, Any]:
    """Write report.html, report.md and report.json into `out`; the same input gives the same bytes.

    Args:
        manifest: nbl.json.
        verify: verify.json.
        bench: bench.json, or None where speed was not measured.
        out: an existing directory.

    Returns:
        The value of report.json.

    Raises:
        CorruptError: the two variants of a test have different numbers of rounds.
    """
    report = summarize(manifest, verify, bench)
    page = present(report)
    source = importlib.resources.files("nbl_export").joinpath("report.html.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    (out / "report.html").write_text(template.render(page=page), encoding="utf-8")
    (out / "report.md").write_text(markdown(page), encoding="utf-8")
    write_json(out / "report.json", report)
    return report


# -- values --------------------------------------------------------------------------------------------------


def summarize(manifest: dict[str, Any], verify: dict[str, Any], bench: dict[str, Any] | None) -> dict[str, Any]:
    """The value of report.json: rows, paired ratios and everything the page states, figures that are not finite as None."""
    measured = bench or {}
    timings = [
        Timing(Scenario(t["kind"], t["tokens"], t["depth"]), t["variant"], tuple(t["samples_ns"]))
        for t in measured.get("timings", [])
    ]
    variants = measured.get("variants", {})
    rungs = verify["rungs"]
    verified = verify["passed"] and all(r["passed"] for r in rungs) and manifest.get("status") != "failed"
    names = ("peak_memory_bytes", "kv_cache_bytes", "kv_cache_bytes_per_token", "model_bytes", "load_seconds")
    report = {
        "schema": 1,
        "verified": verified,
        **{name: manifest.get(name) for name in _COPIED},
        "scores": manifest.get("scores", []),
        "stage_seconds": {name: stage["seconds"] for name, stage in manifest.get("stages", {}).items()},
        "precision": verify.get("precision"),
        "rungs": rungs,
        "price": verify.get("price", []),
        "cache_bytes_per_token": verify["cache_bytes_per_token"],
        "rows": [_row(t) for t in timings],
        "ratios": _ratios(timings),
        "variants": variants,
        **{name: {v: facts.get(name) for v, facts in variants.items()} for name in names},
        "machine": measured.get("machine"),
        "bench": {k: v for k, v in measured.items() if k not in ("machine", "timings", "variants")} if bench else None,
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def _row(timing: Timing) -> dict[str, Any]:
    return {
        "test": timing.scenario.test,
        "kind": timing.scenario.kind,
        "tokens": timing.scenario.tokens,
        "depth": timing.scenario.depth,
        "variant": timing.variant,
        "tokens_per_second_median": timing.median,
        "tokens_per_second_mean": timing.mean,
        "tokens_per_second_stdev": timing.stdev,
        "samples": list(timing.tokens_per_second),
    }


def _ratios(timings: list[Timing]) -> list[dict[str, Any]]:
    """NBL tokens/s over the original's, round by round: sample k of both ran one after the other."""
    found = {(t.scenario, t.variant): t for t in timings}
    ratios = []
    for scenario in dict.fromkeys(t.scenario for t in timings):
        original, nbl = (found.get((scenario, variant)) for variant in _VARIANTS)
        if original is None or nbl is None:
            continue
        if len(original.samples_ns) != len(nbl.samples_ns):
            raise CorruptError(
                f"bench.json has {len(original.samples_ns)} rounds of the original and {len(nbl.samples_ns)} of NBL for "
                f"{scenario.test} at depth {scenario.depth}; run the bench stage again"
            )
        pairs = [a / b for a, b in zip(original.samples_ns, nbl.samples_ns, strict=True)]
        ratio, verdict = statistics.median(pairs), _verdict(pairs)
        ratios.append(
            {
                "test": scenario.test,
                "kind": scenario.kind,
                "depth": scenario.depth,
                "ratio": ratio,
                "low": min(pairs),
                "high": max(pairs),
                "spread": "lowest and highest pair",
                "wins": sum(p > 1 for p in pairs) / len(pairs),
                "pairs": len(pairs),
                "verdict": verdict,
                "text": f"{_ratio(ratio)}×" if verdict in ("faster", "slower") else verdict,
            }
        )
    return ratios


def _verdict(pairs: list[float]) -> str:
    if len(pairs) < _FEWEST_PAIRS:
        return "too few rounds"
    if min(pairs) > 1:
        return "faster"
    return "slower" if max(pairs) < 1 else "no clear difference"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- words ---------------------------------------------------------------------------------------------------


def _number(value: float | None, missing: str = "–") -> str:
    """Three significant digits, whole above a thousand."""
    if value is None:
        return missing
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == 0 else f"{value:#.3g}".rstrip(".")


def _ratio(value: float) -> str:
    return f"{value:.2f}" if abs(value - 1) >= 0.005 else f"{value:.3f}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{_number(value)} {unit}"
        value /= 1024
    return f"{_number(value)} GiB"


def _seconds(value: float | None) -> str:
    if value is None or value < 60:
        return "–" if value is None else f"{_number(value)} s"
    return f"{int(value // 60)} min {int(value % 60)} s"


def _change(before: float | None, after: float | None) -> str:
    return "–" if not before or after is None else f"{100 * (after / before - 1):+.1f}%".replace("-", "−")


def _layers(layers: list[int]) -> str:
    """Layers as the command line takes them: 0, 7, 24-29."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


# -- the page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    title: str
    value: str
    note: str
    tone: str = "plain"


@dataclass(frozen=True)
class Table:
    """Cells as text; `words` is how many columns from the left are text, the others are right-aligned numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
