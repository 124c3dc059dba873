"""Tables of speed, size and cost, made from raw results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tables_exits import worst_retrieval
from tables_quality import increase, increase_of

from nbl_export.records.paired import PairedRatio, describe_ratio, paired_ratio
from nbl_export.records.plan import describe_layers
from nbl_export.records.quality import describe_kept, increase_interval, long_range_ends, long_range_row
from nbl_export.text.windows import TWICE

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def describe_pair(found: PairedRatio) -> str:
    """A ratio with its interval. An interval that contains 1 is no difference; too few loads give no verdict."""
    if found.loads == 1:
        return f"×{describe_ratio(found.ratio)} (one load)"
    interval = f"{describe_ratio(found.low)} to {describe_ratio(found.high)}"
    if found.verdict == "too few loads":
        return f"×{describe_ratio(found.ratio)} ({interval} in {found.loads} loads)"
    if found.verdict == "no clear difference":
        return f"no clear difference ({interval})"
    return f"×{describe_ratio(found.ratio)} ({interval})"


def level(found: Iterable[PairedRatio]) -> str:
    """The interval of all ratios of a table in words, as "96.9% interval of 6 loads".

    Raises:
        ValueError: the ratios have different numbers of loads, so one sentence is not true of all.
    """
    (kind,) = {ratio.interval for ratio in found}
    return kind


def of_rounds(before: Sequence[float], after: Sequence[float]) -> PairedRatio:
    """The ratio of durations of which each round was a load."""
    return paired_ratio(before, after, range(len(after)))


def paired(run: Mapping[str, Any], variant: str, test: str, depth: int) -> PairedRatio:
    """Ratio of a test, by load, from a report.json or from the output of `bench --json`."""
    base = run.get("base", "original")
    old, new = (_of(run["rows"], name, test, depth) for name in (base, variant))
    return paired_ratio([1 / s for s in old["samples"]], [1 / s for s in new["samples"]], old["loads"])


def _of(rows: Sequence[Mapping[str, Any]], variant: str, test: str, depth: int) -> Mapping[str, Any]:
    (found,) = [r for r in rows if (r["variant"], r["test"], r["depth"]) == (variant, test, depth)]
    return found


def measured(run: Mapping[str, Any], test: str, depth: int = 0, variant: str = "nbl") -> str:
    """The ratio of the samples of a test whose name begins so; empty if there are none."""
    named = (row["test"] for row in run.get("rows", ()) if row["test"].startswith(test) and row["depth"] == depth)
    name = next(named, None)
    return describe_pair(paired(run, variant, name, depth)) if name else ""


_DEFAULT = ", default"  # ends the title of a job by default options
_SUMS = ("answers", "loss_original", "loss_nbl", "gain")
_TEXTS = ("unseen part of the calibration text", "Python's documentation")


def headline(read: Read) -> Rows:
    """What default jobs with predicted KV give, for the README: the worst text stands for all."""
    heads = (
        "model",
        "TTFT, prompt of 2,048 tokens",
        "of 512",
        "perplexity, worst text",
        "WikiText-2",
        "worst retrieval task",
    )
    rows: Rows = [heads, "l" * len(heads)]
    for title, run, _ in _defaults(read):
        speeds = (measured(run, test) for test in ("pp2048", "pp512"))
        retrieval = worst_retrieval(read, title, run["exit"]["layer"], run["exit"]["recent_tokens"])
        rows.append((title, *speeds, increase(max(run["losses"], key=_rise)), _perplexity(run), retrieval))
    return rows


def _rise(loss: Mapping[str, Any]) -> float:
    windows = loss["per_window"]
    found = increase_interval(windows["loss_original"], windows["loss_nbl"]).value
    return math.inf if found is None else found


def headline_losses(read: Read) -> Rows:
    """What default jobs with predicted KV lose, text by text."""
    heads = ("model", *_TEXTS, "WikiText-2", "long-range tokens keep")
    rows: Rows = [heads, "l" * len(heads)]
    for title, run, step in _defaults(read):
        long_range = kept(step, step["quality_losses"])
        rows.append((title, *map(increase, run["losses"]), _perplexity(run), long_range))
    return rows


def _defaults(read: Read) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Title, run and the candidate that decided of each default job that was timed."""
    for run in read("exit-layers")["rows"]:
        step = decided(run)
        if run["rows"] and step and run["title"].endswith(_DEFAULT):
            yield run["title"].removesuffix(_DEFAULT), run, step


def decided(run: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The tested candidate that a job took; None if its exit layer was named."""
    return next((step for step in run["path"] if step["within"]), None)


def _perplexity(run: Mapping[str, Any]) -> str:
    """Increase of the perplexity of a text that `eval` read, behind prompts, with two standard errors over windows."""
    found = next((row for row in run["tasks"] if row["metric"] == "token_perplexity"), None)
    if found is None:
        return "not measured"
    before = found["figures"]["original"]["value"]
    (change,) = found["differences"]
    return f"{100 * change['value'] / before:+.1f}% ± {200 * change['stderr'] / before:.1f}"


def kept(step: Mapping[str, Any], losses: Sequence[Mapping[str, Any]]) -> str:
    """What long-range tokens keep on each text, and in passages that occur twice, from their losses in each passage.

    Rows of an earlier version have one figure of all texts.
    """
    found = step.get("long_range")
    if not found:
        return "not measured"
    pooled = found if isinstance(found, dict) else found[0]
    if "text" not in pooled:
        return f"{describe_kept(_recomputed('', pooled))} on all texts together"
    rows = {row["text"]: _recomputed(row["text"], row) for row in found}
    texts = [loss["text"] for loss in losses]
    return "; ".join(_judged(rows.get(text)) for text in (*texts, TWICE))


def _judged(row: Mapping[str, Any] | None) -> str:
    return describe_kept(row) if row and long_range_ends(row) else "too few"


def _recomputed(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    windows = row["per_window"]
    passages = list(zip(*(windows[sums] for sums in _SUMS), strict=True))
    return long_range_row(name, passages, row.get("looks", ()))


def exchange(read: Read) -> Rows:
    """What jobs reach: with an exit layer, and with linear layers within a limit on quality."""
    heads = ("job", "layers", "prompt of 512", "of 2,048", "decode", *_TEXTS, "long-range tokens keep")
    rows: Rows = [heads, "l" * len(heads)]
    for row in (*read("exit-layers")["rows"], *read("exchange")["rows"]):
        stop, linear = row.get("exit"), describe_layers(tuple(row.get("layers", {}).get("linear", ())))
        layers = f"predicted KV {stop['layer']}-{row['num_layers'] - 1}" if stop else f"linear {linear}"
        speeds = [measured(row, test) or "not measured" for test in ("pp512", "pp2048", "tg")]
        rows.append((row["title"], layers, *speeds, *map(increase, row["losses"]), kept(row, row["losses"])))
    return rows


def search(read: Read) -> Rows:
    """What the search for an exit layer measured in each default job."""
    rows: Rows = [("job", "exit layer", "recent tokens", *_TEXTS, "lost", "prefill of 512, modelled"), "lrrrrrr"]
    for row in read("exit-layers")["rows"]:
        for point in row["points"]:
            losses = (f"{100 * value:+.1f}%".replace("-", "−") for value in point["increases"])
            lost, layer = f"{100 * point['long_range']:.0f}%", str(point["replaced_layers"][0])
            rows.append((row["title"], layer, str(point["recent_tokens"]), *losses, lost, f"×{point['prefill']:.2f}"))
    return rows


def job_times(read: Read) -> Rows:
    """Minutes of the stages of jobs with predicted KV."""
    stages = ("calibrate", "plan", "verify", "bench")
    rows: Rows = [("job", *stages, "all stages"), "l" + "r" * (len(stages) + 1)]
    for row in read("exit-layers")["rows"]:
        seconds = row["seconds"]
        if "bench" not in seconds:  # a job that did not end
            continue
        rows.append((row["title"], *(f"{t / 60:.1f} min" for t in (*map(seconds.get, stages), sum(seconds.values())))))
    return rows


def intervals(read: Read) -> Rows:
    """The share of trials whose interval contains the true ratio; the lowest over all kinds of noise."""
    columns = {
        "6 loads": "6 loads",
        "12 loads": "12 loads",
        "24 loads": "24 loads",
        "until narrow": "rounds end when narrow",
        "12 loads, rounds as if independent": "12 loads, rounds taken as independent",
        "12 loads, signed rank": "12 loads, signed rank",
        "24 loads, signed rank": "24 loads, signed rank",
    }
    rows: Rows = [("correlation of two rounds of a load", *columns.values()), "l" + "r" * len(columns)]
    found = read("intervals")["rows"]
    for correlation in sorted({row["correlation"] for row in found}):
        held = [row["held"] for row in found if row["correlation"] == correlation]
        rows.append((f"{correlation:g}", *(f"{100 * min(h[column] for h in held):.1f}%" for column in columns)))
    return rows


def coverage(read: Read) -> Rows:
    """The share of trials whose interval of a mean over windows contains the mean, and its length."""
    found = read("coverage-perplexity")["rows"]
    correlations = sorted({row["correlation"] for row in found})
    heads = (f"correlation {value:g}" for value in correlations)
    rows: Rows = [("differences", "windows", *heads), "lr" + "r" * len(correlations)]
    for kind, windows in dict.fromkeys((row["differences"], row["windows"]) for row in found):
        cells = [row for row in found if (row["differences"], row["windows"]) == (kind, windows)]
        shown = (f"{100 * row['held']['this']:.1f}% (×{row['width']['this']:.1f})" for row in cells)
        rows.append((kind, str(windows), *shown))
    return rows


def looks_level(read: Read) -> Rows:
    """The share of trials with a wrong verdict, of a true loss at the limit."""
    found = read("looks")
    heads = ("differences", "correlation", "looks: within", "beyond", "8 windows once: within", "beyond")
    rows: Rows = [heads, "l" + "r" * (len(heads) - 1)]
    for row in found["rows"]:
        if row["loss"] == found["limit"]:
            shares = (f"{100 * row[rule][verdict]:.1f}%" for rule in ("looks", "once") for verdict in _VERDICTS)
            rows.append((row["differences"], f"{row['correlation']:g}", *shares))
    return rows


_VERDICTS = ("within", "beyond")


def looks_power(read: Read) -> Rows:
    """The share of trials with the right verdict, and the windows that looks read."""
    found = read("looks")
    cases = list(dict.fromkeys((row["differences"], row["correlation"]) for row in found["rows"]))
    rows: Rows = [("true loss", *(f"{kind}, correlation {r:g}" for kind, r in cases)), "l" + "r" * len(cases)]
    for loss in dict.fromkeys(row["loss"] for row in found["rows"] if row["loss"] != found["limit"]):
        verdict = "within" if loss < found["limit"] else "beyond"
        cells = [row for row in found["rows"] if row["loss"] == loss]
        shown = (
            f"{row['looks'][verdict]:.0%} ({row['once'][verdict]:.0%}), {row['looks']['windows']:.0f} windows"
            for row in cells
        )
        rows.append((f"+{loss:g}%, {verdict}", *shown))
    return rows


_METHODS = {
    "float32": "float32", "rtn": "to nearest (`default`)", "awq": "AWQ, then to nearest", "k_quant": "`k_quant`",
    "k_quant_mixed": "`k_quant_mixed`",
}  # fmt: skip


def int4_methods(read: Read) -> Rows:
    """The original rounded to int4: size, perplexity over float32, and speed of one core over rounding to nearest."""
    run = read("int4-methods-smollm2")
    times = run["core_seconds"]
    pairs = {
        (name, phase): of_rounds(times["rtn"][phase], found[phase]) for name, found in times.items() for phase in found
    }
    heads = ("MB", "C4", "WikiText-2", f"prefill 512 ({level(pairs.values())})", "decode")
    rows: Rows = [("rounding", *heads), "l" + "r" * len(heads)]
    for name, title in _METHODS.items():
        rises = [_rounded(run["rows"], name, text) for text in ("c4", "wikitext")]
        speeds = (
            describe_pair(pairs[name, phase]) if name not in ("float32", "rtn") else ""
            for phase in ("prefill", "decode")
        )
        rows.append((title, f"{run['bytes'][name] / 1e6:.0f}", *rises, *speeds))
    return rows


def _rounded(rows: Mapping[str, Any], name: str, text: str) -> str:
    """Perplexity of float32, and the increase of another method."""
    own, base = (rows[one][text]["losses"] for one in (name, "float32"))
    return f"{math.exp(statistics.mean(own)):.1f}" if name == "float32" else increase_of(base, own)
