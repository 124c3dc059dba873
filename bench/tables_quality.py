"""Tables of quality, made from raw results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nbl_export.records.plan import spoken_layers

Rows = list[Sequence[str]]
Read = Callable[[str], Any]
TASKS = {"lambada_openai": "LAMBADA", "arc_easy": "ARC-Easy", "piqa": "PIQA"}
TEXTS = ("c4 rest", "wikitext-2 valid", "realnews")


def rise(price: Mapping[str, float]) -> str:
    return f"{100 * (price['nbl'] / price['original'] - 1):+.0f}%"


def rises(prices: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [rise(prices[text]) for text in TEXTS]


def _counts(read: Read) -> Iterator[tuple[str, Mapping[str, Any], dict[str, Any], float, Mapping[str, Any]]]:
    """For each count: the row of `efficient`; layers, modelled speed and perplexities of `cca`, the paper's choice."""
    today, prices = read("quality-ladder-labels"), read("quality-default")
    for count, theirs in sorted(today["paper"].items(), key=lambda item: int(item[0])):
        paper = prices["residual"][f"cca {count}"]
        yield count, today["rows"][count], theirs["layers"], theirs["modelled_prefill"], paper


def ladder(read: Read) -> Rows:
    """For each count: `cca` in closed form, and `efficient` in closed form, distilled, and with attention dropped."""
    rows: Rows = [("", "layers", "C4", "WikiText-2", "realnews", "prefill, modelled"), "llrrrr"]
    for count, row, layers, speed, prices in _counts(read):
        title = f"**{count} layers**: `cca`, closed form (the paper)"
        rows.append((title, spoken_layers(layers), *rises(prices), f"×{speed:.2f}"))
        for title, fit in (
            ("`efficient`, closed form (the default)", "independent"),
            ("`efficient`, `--fit distilled`", "distilled"),
            ("`efficient`, `--fit drop`", "drop"),
        ):
            rows.append((title, spoken_layers(row["layers"]), *rises(row[fit]), f"×{row['modelled_prefill']:.2f}"))
    return rows


def ladder_points(read: Read) -> list[dict[str, Any]]:
    """Points of the plot: the perplexity increase on the text with the largest one."""
    points = []
    for count, row, _, speed, paper in _counts(read):
        ours = row["modelled_prefill"]
        shown = (("paper", speed, paper), ("nbl", ours, row["independent"]), ("distilled", ours, row["distilled"]))
        for method, prefill, prices in shown:
            worst = max(prices[text]["nbl"] / prices[text]["original"] - 1 for text in TEXTS)
            points.append({"method": method, "layers": int(count), "prefill": prefill, "worst_increase": worst})
    return points


def choices(read: Read) -> Rows:
    prices = read("quality-default")["normed"]
    rows: Rows = [("layers replaced", "chosen by", "C4", "WikiText-2", "realnews"), "llrrr"]
    for count in (4, 8, 10, 12, 15):
        for select in ("error", "greedy") if count == 8 else ("cca", "greedy"):
            rows.append((str(count), f"`{select}`", *rises(prices[f"{select} {count}"])))
    return rows


def tails(read: Read) -> Rows:
    result = read("quality-tails")
    rows: Rows = [("layers", "C4", "WikiText-2", "realnews", "prefill"), "lrrrr"]
    for layers, prices in result["residual"].items():
        title = layers.replace(",", ", ") + (" (`cca`)" if layers == "0,7,24-29" else "")
        rows.append((title, *rises(prices), f"×{result['modelled_prefill'][layers]:.2f}"))
    return rows


def tasks(read: Read) -> Rows:
    """Changes are from the original of the same run. The original's row comes from the run of the distilled rows."""
    found, today = read("tasks-smollm2")["tasks"], read("tasks-distilled-smollm2")["tasks"]
    rows: Rows = [("", *(f"{shown} ({found[name]['documents']:,})" for name, shown in TASKS.items())), "lrrr"]
    titles = {"original": "original"}
    for count in (4, 8, 12):
        titles |= {
            f"cca {count}": f"{count} layers, `cca`, closed form",
            f"distilled {count}": f"{count} layers, `efficient`, `--fit distilled`",
            f"dropped {count}": f"{count} layers, `efficient`, `--fit drop`",
        }
    for row, title in titles.items():
        scores = [(today[name]["rows"].get(row) or found[name]["rows"][row])["acc"] for name in TASKS]
        rows.append((title, *(accuracy_of(score, row) for score in scores)))
    return rows


def graphs(read: Read) -> Rows:
    """Accuracies of the shipped graphs, and the distance of `model/` from the torch NBL model, item by item."""
    run = read("graph-tasks-smollm2")
    accuracy = {r["task"]: r for r in run["table"] if r["metric"] == "acc"}
    agreed = {a["task"]: a for a in run["agreement"] if a["graph"] == "nbl"}
    titles = ("", "`original/`", "`model/`", "same answers as torch", "largest difference of a log-likelihood")
    rows: Rows = [titles, "lrrrr"]
    for name, shown in TASKS.items():
        figures, (change, *_) = accuracy[name]["figures"], accuracy[name]["differences"]
        nbl = {"value": figures["nbl"]["value"], "change": change["value"], "change_stderr": change["stderr"]}
        same, apart = "–", "–"
        if name in agreed:
            same = f"{agreed[name]['same_answers']:,} of {agreed[name]['items']:,}"
            apart = f"{agreed[name]['loglikelihood']['largest']:.4f}"
        rows.append((shown, accuracy_of(figures["original"], "original"), accuracy_of(nbl, "nbl"), same, apart))
    return rows


def accuracy_of(figure: Mapping[str, float], row: str) -> str:
    value = f"{100 * figure['value']:.1f}%"
    if row == "original":
        return value
    return f"{value} ({100 * figure['change']:+.1f} ± {100 * figure['change_stderr']:.1f})"


def distilled(read: Read) -> Rows:
    run = read("quality-distill-c4-default")["distill"]
    minutes = f"{run['settings']['minutes']:g}"
    rows: Rows = [
        ("perplexity", "original", "closed form", f"distilled, {minutes} minutes of 2 cores", "increase removed"),
        "lrrrr",
    ]
    names = ("C4, not seen", *(f"{name} (no such text in calibration)" for name in ("WikiText-2", "realnews")))
    for name, text in zip(names, TEXTS, strict=True):
        before, after = run["independent"][text], run["distilled"][text]
        values = [f"{value:.1f}" for value in (before["original"], before["nbl"], after["nbl"])]
        rows.append((name, *values, f"{100 * run['removed'][text]:.0f}%"))
    return rows
