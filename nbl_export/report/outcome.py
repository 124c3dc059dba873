"""The result of a run in a few lines: what it replaced, what that gains, what it costs, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.options.goals import DEFAULT_INCREASE
from nbl_export.records.paired import spoken_ratio
from nbl_export.records.plan import spoken_layers
from nbl_export.records.quality import FAR_SHARE, far_ends, spoken_far, spoken_loss
from nbl_export.report import words

__all__ = ["judged", "limit_of", "next_steps", "outcome", "spoken_cut"]

_SHOWN = 4  # ratios of a line; the report has all
_PHASES = {"pp": "prefill", "tg": "decode"}


def outcome(report: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Layers, speed, cache and loss, a line each, of the value of report.json."""
    replaced, total = report["replaced_layers"], report["num_layers"]
    which = f"{len(replaced)} of {total} replaced" + (f": {spoken_layers(replaced)}" if replaced else "")
    cache = report["cache_bytes_per_token"]
    ends = f"{words.size(cache['original'])} to {words.size(cache['nbl'])} a token"
    return (
        ("layers", spoken_cut(report) or which),
        *((name, _speed(report, kind)) for kind, name in _PHASES.items()),
        ("cache", f"{words.change(cache['original'], cache['nbl'])}, {ends}"),
        *(("" if k else "loss", said) for k, said in enumerate(tuple(_losses(report)) or ("not measured",))),
    )


def spoken_cut(report: Mapping[str, Any]) -> str:
    """Which keys of a run are predicted, in words; "" if none are."""
    cut = report.get("cut")
    if not cut:
        return ""
    return (
        f"of a prompt, the last {cut['near']} tokens and the first pass layers {cut['layer']} to "
        f"{report['num_layers'] - 1}; keys of the others are predicted there"
    )


def _speed(report: Mapping[str, Any], kind: str) -> str:
    ratios = sorted((r for r in report["ratios"] if r["kind"] == kind), key=lambda r: (r["depth"], r["tokens"]))
    said = [f"{r['text']} ({spoken_ratio(r['low'])} to {spoken_ratio(r['high'])}) of {r['tokens']:,} tokens{_behind(r)}"
            for r in ratios[:_SHOWN]]  # fmt: skip
    return ", ".join(said) or "not measured"


def _behind(ratio: Mapping[str, Any]) -> str:
    return f" behind {ratio['depth']:,}" if ratio["depth"] else ""


def _losses(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["quality_loss"]:
        yield f"perplexity {spoken_loss(row)['increase']} on {row['text']}"
    if report.get("far"):
        yield spoken_far(report["far"])
    verdict = judged(report)
    if verdict:
        yield f"{verdict} the limit of {limit_of(report)[0]}"


def limit_of(report: Mapping[str, Any]) -> tuple[str, float]:
    """The limit on quality that a run is judged by, in words and as a share: its goal, or else the tool's default."""
    asked = (report.get("goal") or {}).get("max_perplexity_increase")
    default = (report.get("goal") or {}).get("default", True)
    usual = f"{DEFAULT_INCREASE:.0%} (the default)"
    try:
        return (usual, DEFAULT_INCREASE) if default or not asked else (asked, float(asked.rstrip("% ")) / 100)
    except ValueError:  # the text of a stranger
        return usual, DEFAULT_INCREASE


def judged(report: Mapping[str, Any]) -> str:
    """Whether every interval of the loss is "within" the limit, one is "above" it, or "near" if neither is shown.

    Of answers from far back, `records.quality.FAR_SHARE` times the limit may be lost.

    "" if no loss was measured.
    """
    rows, share = report["quality_loss"], limit_of(report)[1]
    if not rows:
        return ""
    ends = [_ends(row) for row in rows]
    if report.get("far"):
        ends.append([end / FAR_SHARE for end in far_ends(report["far"])])
    if any(low > share for low, _ in ends):
        return "above"
    return "within" if all(high <= share for _, high in ends) else "near"


def _ends(row: Mapping[str, Any]) -> Sequence[float]:
    if row["increase"] is None:
        return math.inf, math.inf
    return row["increase_interval"] or (row["increase"], row["increase"])


def next_steps(report: Mapping[str, Any], directory: Path) -> Iterator[tuple[str, str]]:
    """What to do with a finished run: commands, and the page to read."""
    place = shlex.quote(str(directory))
    if judged(report) == "above":
        trained = ", or train the maps (--fit distilled)" if report["fit"] == "independent" else ""
        higher = report.get("cut") and f"cut higher (--cut {report['cut']['layer'] + 1})"
        yield "better", higher or f"ask for fewer layers (--layers N){trained}"
    yield "try", f'nbl-export generate {place} "Write two sentences about the sea." --both'
