"""The result of a run in a few lines: whether it is worth it, what it gains, what it costs, and what to do next.

rows, ratios of report.json ─► timed ─► a `Timed` for each test ─► verdict, lines, cards, table of speeds
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.options.goals import DEFAULT_INCREASE
from nbl_export.records.paired import describe_ratio
from nbl_export.records.plan import describe_layers
from nbl_export.records.quality import (
    LONG_RANGE_SHARE,
    describe_kept,
    describe_long_range,
    describe_loss,
    describe_retrieval,
    long_range_ends,
)
from nbl_export.records.results import FAILED
from nbl_export.report import words

__all__ = [
    "Timed",
    "at_limit",
    "describe_exit",
    "faster_runtime",
    "headline",
    "judged",
    "limit_of",
    "next_steps",
    "outcome",
    "timed",
    "verdict",
    "worst_long_range",
    "worst_loss",
]

_SHOWN = 4  # tests of a line; the report has all
_WIDE = 1.25  # ends of an interval that are further apart say little
_APART = 0.05  # so much may the ratio of medians differ from the median of ratios
_TEST = ("kind", "tokens", "depth")


@dataclass(frozen=True)
class Timed:
    """A test, with the row of each decoder and the ratio of report.json; None if one of them was not timed."""

    original: Mapping[str, Any] | None
    nbl: Mapping[str, Any] | None
    ratio: Mapping[str, Any] | None

    @property
    def row(self) -> Mapping[str, Any]:
        """Facts of the test."""
        return self.original or self.nbl or {}

    @property
    def is_noisy(self) -> bool:
        """Whether the interval is wide, or the medians of both decoders have another ratio."""
        if self.ratio is None or self.original is None or self.nbl is None:
            return False
        medians = self.nbl["tokens_per_second_median"] / self.original["tokens_per_second_median"]
        wide = self.ratio["high"] > _WIDE * self.ratio["low"]
        return bool(wide or abs(medians / self.ratio["ratio"] - 1) > _APART)

    @property
    def verdict(self) -> str:
        """faster, slower, no clear difference, ...; a noisy difference is called so."""
        found = str(self.ratio["verdict"]) if self.ratio else ""
        return f"{found}, noisy" if found in ("faster", "slower") and self.is_noisy else found

    def latency(self, variant: Mapping[str, Any] | None) -> str:
        """Time to first token of a prompt, or time per output token."""
        if variant is None:
            return "–"
        return words.milliseconds(variant["ttft_seconds"] or (variant["tpot_seconds"] or {}).get("p50"))

    @property
    def ratio_text(self) -> str:
        """The ratio, or that there is no clear difference."""
        return str(self.ratio["text"]) if self.ratio else "–"

    @property
    def interval(self) -> str:
        """Ends of the ratio's interval."""
        return f"{describe_ratio(self.ratio['low'])} to {describe_ratio(self.ratio['high'])}" if self.ratio else "–"

    @property
    def line(self) -> str:
        """The test, latency of both, and how much faster NBL is."""
        both = [self.latency(row) for row in (self.original, self.nbl)]
        times = "" if "–" in both else f"{both[0]} → {both[1]}, "
        noisy = ", noisy" * self.verdict.endswith("noisy")
        return f"{words.test(self.row)}: {times}{self.ratio_text} ({self.interval}){noisy}"


def timed(report: Mapping[str, Any], kind: str = "") -> list[Timed]:
    """Tests of a kind (pp, tg, or all) as they were run."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in report["rows"]:
        if row["variant"] in ("original", "nbl") and (not kind or row["kind"] == kind):
            found.setdefault(tuple(row[name] for name in _TEST), {})[row["variant"]] = row
    ratios = {tuple(ratio[name] for name in _TEST): ratio for ratio in report["ratios"]}
    return [Timed(rows.get("original"), rows.get("nbl"), ratios.get(test)) for test, rows in found.items()]


def headline(report: Mapping[str, Any], kind: str) -> list[Timed]:
    """Tests of a kind that have a ratio: least depth, then longest first."""
    found = [test for test in timed(report, kind) if test.ratio]
    return sorted(found, key=lambda test: (test.row["depth"], -test.row["tokens"]))


def outcome(report: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Verdict, layers, speed, cache and loss, a line each, of the value of report.json."""
    replaced = report["replaced_layers"]
    total = report["num_layers"]
    which = f"{len(replaced)} of {total} replaced" + (f": {describe_layers(replaced)}" if replaced else "")
    cache = report["cache_bytes_per_token"]
    ends = f"{words.size(cache['original'])} to {words.size(cache['nbl'])} a token"
    said = verdict(report)
    return (
        *((("verdict", said),) if said else ()),
        ("layers", describe_exit(report) or which),
        ("TTFT", _speed(report, "pp")),
        ("decode", _speed(report, "tg")),
        ("KV cache", f"{words.change(cache['original'], cache['nbl'])}, {ends}"),
        *(("" if k else "loss", said) for k, said in enumerate(tuple(_losses(report)) or ("not measured",))),
    )


def verdict(report: Mapping[str, Any]) -> str:
    """For which prompts the run is worth its loss, of what was measured; "" of a failed run, or of the original."""
    if report["status"] == FAILED or not report["replaced_layers"]:
        return ""
    gain, is_worth = _gain(report)
    quality = judged(report)
    limit = limit_of(report)[0]
    loses = "What it loses was not measured."
    if quality:
        loss = describe_loss(worst_loss(report["quality_loss"]))["increase"]
        which = " on the worst text" if len(report["quality_loss"]) > 1 else ""
        loses = f"Loses: perplexity {loss}{which}{_beyond(report)}, {at_limit(quality)} the limit of {limit}."
    if is_worth and quality == "above":
        gain = "Faster, but not worth it at this limit."
    return f"{gain} {loses}"


def _beyond(report: Mapping[str, Any]) -> str:
    """What long-range tokens keep, if that is not shown to be within the limit."""
    worst = worst_long_range(report.get("long_range", ()))
    if worst is None or _ends_of(worst)[1] <= limit_of(report)[1]:
        return ""
    return f"; long-range tokens keep {describe_kept(worst)} of what long-range context gives them"


def worst_long_range(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The text whose long-range tokens may lose most, of those that have enough to be judged by."""
    return max(filter(long_range_ends, rows), key=lambda row: _ends_of(row)[1], default=None)


def worst_loss(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The row of the text that suffers most: a smaller figure of another text misleads."""
    return next((row for row in rows if row["increase"] is None), None) or max(rows, key=lambda row: row["increase"])


def _gain(report: Mapping[str, Any]) -> tuple[str, bool]:
    """What gains, and whether anything does."""
    prompts = [test for test in headline(report, "pp") if not test.row["depth"]]
    further = headline(report, "tg")[:1]
    if not report["ratios"]:
        return "Speed was not measured.", False
    if any(test.verdict == "faster" for test in prompts):
        decode = {"faster": "; decode is faster too", "slower": "; decode is slower"}
        also = decode.get(further[0].verdict, "") if further else ""
        return f"Worth it for prompts of {_lengths(prompts)}{also}.", True
    if further and further[0].verdict == "faster":
        return "Worth it for long answers, not for prompts.", True
    if all(test.verdict == "too few loads" for test in (*prompts, *further)):
        return "Too few loads for a verdict on speed.", False
    if any(test.verdict == "faster, noisy" for test in (*prompts, *further)):
        return "Not shown to be worth it: the measurement is noisy.", False
    if report["cache_bytes_per_token"]["nbl"] < report["cache_bytes_per_token"]["original"]:
        return "Worth it for a smaller cache alone: no test is clearly faster.", False
    return "Not worth it here: no test is clearly faster.", False


def _lengths(prompts: Sequence[Timed]) -> str:
    """Lengths at which prompts are faster, and all others that were measured: a verdict is of no other length."""
    found: dict[str, list[int]] = {}
    for test in prompts:
        name = test.verdict if test.verdict in ("faster", "slower") else "not shown"
        found.setdefault(name, []).insert(0, test.row["tokens"])
    others = [f"{name} at {words.numbers(counts)}" for name, counts in found.items() if name != "faster"]
    if not others:
        others = ["the only length measured" if len(prompts) == 1 else "all lengths measured"]
    return f"{words.numbers(found['faster'])} tokens ({', '.join(others)})"


def describe_exit(report: Mapping[str, Any]) -> str:
    """Which layers a prompt skips, in words; "" without an exit layer."""
    prompt_exit = report.get("exit")
    if not prompt_exit:
        return ""
    first = prompt_exit["layer"]
    last = report["num_layers"] - 1
    which = f"layers {first} to {last} run" if first < last else f"layer {last} runs"
    return (
        f"{which} for the first token of a prompt and the last {prompt_exit['recent_tokens']}; other tokens exit, and "
        "get predicted KV there"
    )


def _speed(report: Mapping[str, Any], kind: str) -> str:
    return "; ".join(test.line for test in headline(report, kind)[:_SHOWN]) or "not measured"


def _losses(report: Mapping[str, Any]) -> Iterator[str]:
    for row in report["quality_loss"]:
        yield f"perplexity {describe_loss(row)['increase']} on {row['text']}"
    yield from map(describe_long_range, report.get("long_range", ()))
    yield from map(describe_retrieval, report.get("retrieval", ()))
    verdict = judged(report)
    if verdict:
        yield f"{at_limit(verdict)} the limit of {limit_of(report)[0]}"


def limit_of(report: Mapping[str, Any]) -> tuple[str, float]:
    """The limit on quality that a run is judged by, in words and as a share: its goal, or else the tool's default."""
    asked = (report.get("goal") or {}).get("max_perplexity_increase")
    default = (report.get("goal") or {}).get("default", True)
    usual = f"{DEFAULT_INCREASE:.0%} (the default)"
    try:
        return (usual, DEFAULT_INCREASE) if default or not asked else (asked, float(asked.rstrip("% ")) / 100)
    except ValueError:  # the text of a stranger
        return usual, DEFAULT_INCREASE


def at_limit(verdict: str) -> str:
    """What `judged` says, before "the limit": "within", "above" or "undecided at"."""
    return "undecided at" if verdict == "undecided" else verdict


def judged(report: Mapping[str, Any]) -> str:
    """Whether every interval of the loss is "within" the limit, one is "above" it, or "undecided" if neither is shown.

    Of each text's long-range tokens, `records.quality.LONG_RANGE_SHARE` times the limit may be lost.

    "" if no loss was measured.
    """
    rows = report["quality_loss"]
    share = limit_of(report)[1]
    if not rows:
        return ""
    ends = [_ends(row) for row in rows]
    ends += map(_ends_of, filter(long_range_ends, report.get("long_range", ())))
    if any(low > share for low, _ in ends):
        return "above"
    return "within" if all(high <= share for _, high in ends) else "undecided"


def _ends(row: Mapping[str, Any]) -> Sequence[float]:
    if row["increase"] is None:
        return math.inf, math.inf
    return row["increase_interval"] or (row["increase"], row["increase"])


def _ends_of(long_range: Mapping[str, Any]) -> tuple[float, float]:
    """What a text's long-range tokens lose, as a share that the limit of perplexity holds for: highest end last."""
    low, high = long_range_ends(long_range) or (0.0, 0.0)
    return low / LONG_RANGE_SHARE, high / LONG_RANGE_SHARE


def faster_runtime(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """A runtime whose prefill is faster on a CPU, in a sentence, and the command that makes a model for it.

    None if the measured one is the fastest known, or does not run on a CPU.
    """
    found = (report["bench"] or {}).get("faster")
    if not found:
        return None
    lacks = f" It is not available on this machine: {found['lacks']}." if found["lacks"] else ""
    said = (
        f"{found['title']} in {found['precision']}, its default, had a faster prefill than {found['than']} on "
        f"the processors measured (docs/results.md#runtimes-side-by-side).{lacks}"
    )
    return said, f"nbl-export --model {shlex.quote(report['model']['name'])} --engine {found['engine']} --output OTHER"


def next_steps(report: Mapping[str, Any], directory: Path) -> Iterator[tuple[str, str]]:
    """What to do with a finished run: commands, and the page to read."""
    place = shlex.quote(str(directory))
    if judged(report) == "above":
        trained = ", or train the maps (--fit distilled)" if report["fit"] == "independent" else ""
        higher = report.get("exit") and f"exit higher (--exit-layer {report['exit']['layer'] + 1})"
        yield "better", higher or f"ask for fewer layers (--layers N){trained}"
    if faster := faster_runtime(report):
        yield "faster", f"{faster[0]} {faster[1]}"
    yield "try", f'nbl-export generate {place} "Write two sentences about the sea." --both'
