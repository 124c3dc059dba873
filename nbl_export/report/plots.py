"""Numbers -> inline SVG for the report.

Figures are drawn about 390 points wide and scaled by the page, so one drawing serves a desk and a phone. Text
stays text. Colours are CSS variables of the page (with the light theme as fallback), so one drawing serves light
and dark. Rows and ratios are those of report.json.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from nbl_export.report.words import positions

__all__ = ["curve", "depths", "layers", "length", "throughput"]

_NBL, _ORIGINAL, _INK, _TEXT, _GRID = "#1b6ec2", "#c9a66b", "#17212b", "#53606c", "#dce1e6"
_VARIABLES = {_NBL: "--nbl", _ORIGINAL: "--original", _INK: "--ink", _TEXT: "--ink-2", _GRID: "--line"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nbl-export",
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
    "font.size": 10.5,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}
_NAMES = {"original": "original", "nbl": "NBL"}
_LINES = (("-", "o"), ("--", "s"), (":", "D"), ("-.", "^"))
_WIDTH = 5.4  # inches of 72 points


def throughput(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> str:
    """Draw tokens/s as bars (medians) with whiskers (lowest to highest round), a panel a kind, as SVG.

    Prefill and decode differ by an order of magnitude, so each has its own axis. The text of a ratio stands
    beside its two bars.
    """
    panels = [(title, [r for r in rows if r["kind"] == kind]) for kind, title in (("pp", "Prefill"), ("tg", "Decode"))]
    panels = [(title, chosen) for title, chosen in panels if chosen]
    heights = [0.4 + len({(r["test"], r["depth"]) for r in chosen}) for _, chosen in panels]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 0.7 + 0.66 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (title, chosen) in zip(axes, panels, strict=True):
            _bars(axis, chosen, {(r["test"], r["depth"]): r["text"] for r in ratios})
            axis.set_title(title, loc="left", fontsize=11.5, weight="bold")
        axes[-1].set_xlabel("tokens per second")
        return _svg(figure, axes[0], "throughput")


def _bars(axis: Axes, rows: Sequence[dict[str, Any]], texts: dict[tuple[str, int], str]) -> None:
    groups = list(dict.fromkeys((r["test"], r["depth"]) for r in rows))
    highest = max(max(r["samples"]) for r in rows)
    named: set[str] = set()
    for row in rows:
        variant, median, samples = row["variant"], row["tokens_per_second_median"], row["samples"]
        at = groups.index((row["test"], row["depth"])) + (-0.19 if variant == "original" else 0.19)
        label = None if variant in named else _NAMES[variant]
        named.add(variant)
        axis.barh(at, median, 0.34, color=_NBL if variant == "nbl" else _ORIGINAL, label=label)
        spread = [[median - min(samples)], [max(samples) - median]]
        axis.errorbar(median, at, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1.3, capsize=3)
        axis.text(max(samples) + highest * 0.02, at, _short(median), va="center", color=_TEXT, fontsize=9.5)
    for at, group in enumerate(groups):
        text = texts.get(group, "").replace("clear ", "clear\n").replace("few ", "few\n")
        axis.text(1.02, at, text, transform=axis.get_yaxis_transform(), va="center", weight="bold")
    axis.set_xlim(0, highest * 1.22)
    axis.set_yticks(range(len(groups)), [f"{test}\ndepth {depth}" for test, depth in groups])
    axis.set_ylim(len(groups) - 0.45, -0.55)
    axis.spines["bottom"].set_visible(False)
    _quiet(axis, "x")


def depths(ratios: Sequence[dict[str, Any]]) -> str:
    """Draw the paired ratio (median, whiskers of its interval) against depth, a line a test, as SVG."""
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 3.5), layout="constrained")
        axis = figure.subplots()
        axis.axhline(1.0, color=_ORIGINAL, linewidth=2, label="original")
        tests = list(dict.fromkeys(r["test"] for r in ratios))
        apart = 0.02 * max(r["depth"] for r in ratios)  # so that whiskers of two tests stand side by side
        for index, test in enumerate(tests):
            chosen = sorted((r for r in ratios if r["test"] == test), key=lambda r: r["depth"])
            spread = [[r["ratio"] - r["low"] for r in chosen], [r["high"] - r["ratio"] for r in chosen]]
            line, marker = _LINES[index % len(_LINES)]
            look: dict[str, Any] = {"color": _NBL, "linestyle": line, "marker": marker, "markersize": 6, "capsize": 4}
            places = [r["depth"] + apart * (index - (len(tests) - 1) / 2) for r in chosen]
            axis.errorbar(places, [r["ratio"] for r in chosen], spread, label=test, **look)
        axis.set_xticks(sorted({r["depth"] for r in ratios}))
        axis.margins(0.08, 0.12)
        axis.set_xlabel("tokens already in the cache (depth)")
        axis.set_ylabel("NBL tokens/s over original")
        _quiet(axis, "y")
        return _svg(figure, axis, "depths")


def length(found: Sequence[dict[str, Any]]) -> str:
    """Draw quality at length, `length` of report.json, as SVG: increase of perplexity by position, a line a text, and
    the share of correct keys and tokens of both decoders. Of graphs and torch models, the graphs are drawn. Of a test
    that was repeated with other windows, the last one is drawn.
    """
    of_graphs = any(d["new"] == "nbl" for one in found for row in one["rows"] for d in row["differences"])
    new, old = ("nbl", "original") if of_graphs else ("torch-nbl", "torch-original")
    both = [one for one in found if all(v in row["figures"] for v in (new, old) for row in one["rows"])]
    found = list({one["task"]: one for one in both}.values())  # the last one of each
    lines, bars = ([o for o in found if (o["test"] == "position") == wanted] for wanted in (True, False))
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 2.8 * bool(lines) + 2.2 * bool(bars) + 0.3), layout="constrained")
        parts = figure.subfigures(max(1, bool(lines) + bool(bars)), 1, squeeze=False)[:, 0]
        axes = [parts[0].subplots()] if lines else []
        for one, (line, marker) in zip(lines, _LINES, strict=False):
            _positions(axes[0], one, new, linestyle=line, marker=marker)
        if len(lines) > 1:
            axes[0].legend(frameon=False, fontsize=9)
        if bars:
            panels = parts[-1].subplots(1, len(bars), squeeze=False, sharey=True)[0]
            for axis, one in zip(panels, bars, strict=True):
                _correct(axis, one, {old: _ORIGINAL, new: _NBL})
            panels[0].set_ylabel("correct")
            axes += list(panels)
        return _svg(figure, axes[-1] if bars else axes[0], "length")


def _positions(axis: Axes, one: dict[str, Any], new: str, **look: Any) -> None:
    ends = [row["tokens"] for row in one["rows"]]
    rises = [next(d for d in row["differences"] if d["new"] == new) for row in one["rows"]]
    points = [
        (k, rise["increase"], rise["increase_interval"]) for k, rise in enumerate(rises) if rise["increase"] is not None
    ]
    axis.axhline(0.0, color=_ORIGINAL, linewidth=2)
    axis.plot(
        [k for k, _, _ in points],
        [value for _, value, _ in points],
        color=_NBL,
        label=one["task"].partition(":")[2],
        **look,
    )
    for k, _, interval in points:
        if interval:
            axis.plot([k, k], interval, color=_NBL, linewidth=1.3)
    axis.set_xticks(range(len(ends)), positions(ends), fontsize=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}" if value else "0%")
    axis.set_xlabel("positions in a window")
    axis.set_ylabel("increase of perplexity")
    _quiet(axis, "y")


def _correct(axis: Axes, one: dict[str, Any], colours: dict[str, str]) -> None:
    for side, (variant, colour) in zip((-0.19, 0.19), colours.items(), strict=True):
        for at, row in enumerate(one["rows"]):
            share = row["figures"][variant]["correct"]
            label = _NAMES[variant.removeprefix("torch-")] if at == 0 else None
            axis.bar(at + side, share, 0.34, color=colour, label=label)
            axis.text(at + side, share + 0.02, f"{share:.0%}", ha="center", color=_TEXT, fontsize=9)
    axis.set_title(one["task"], loc="left", fontsize=10)
    axis.set_xticks(range(len(one["rows"])), [f"{row['tokens']:,}" for row in one["rows"]])
    axis.set_xlabel("tokens")
    axis.set_ylim(0, 1.12)
    axis.set_yticks([0, 0.5, 1])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _quiet(axis, "y")


def layers(name: str, values: Sequence[tuple[int, float]], replaced: Sequence[int], label: str) -> str:
    """Draw one score of every layer, replaced layers filled and named, as SVG; logarithmic if scores span decades.

    Args:
        name: what makes the ids of this drawing unique in the page.
        values: (layer, score) pairs.
        replaced: layers without attention.
        label: the vertical axis.
    """
    gone, scores = set(replaced), [score for _, score in values]
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
        axis = figure.subplots()
        for is_gone, colour, fill, text in (
            (False, _ORIGINAL, "none", "attention kept"),
            (True, _NBL, _NBL, "replaced"),
        ):
            chosen = [value for value in values if (value[0] in gone) == is_gone]
            look: dict[str, Any] = {"color": colour, "markerfacecolor": fill, "markeredgewidth": 2}
            size = 7.0 if len(values) <= 40 else 4.5
            axis.plot([i for i, _ in chosen], [v for _, v in chosen], "o", label=text, markersize=size, **look)
            for layer, score in chosen if is_gone else ():
                place: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
                axis.annotate(str(layer), (layer, score), color=_TEXT, fontsize=size + 1.5, **place)
        if min(scores) > 0 and max(scores) / min(scores) > 30:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(scores) / min(scores) < 1000 else (1,)))
        else:
            axis.set_ylim(min(0.0, *scores), max(*scores, 0.0) * 1.1 or 1.0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(lambda value, _: _short(value))
        axis.yaxis.set_minor_formatter("")
        axis.set_xlabel("layer")
        axis.set_ylabel(label)
        _quiet(axis, "y")
        return _svg(figure, axis, name)


def curve(points: Sequence[dict[str, Any]], layers: int, near: int | None = None) -> str:
    """Draw the perplexity over the original's (logarithmic) against the modelled prefill speed-up, as SVG.

    Args:
        points: those of the manifest's curve.
        layers, near: number of layers, and of near tokens with a cut, of the point to ring.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axis = figure.subplots()
        xs, ys = [p["prefill"] for p in points], [1 + max(p["increases"]) for p in points]
        axis.plot(xs, ys, linestyle="-", marker="o", color=_NBL, markersize=5, label=_NAMES["nbl"])
        for x, y in [
            (x, y) for p, x, y in zip(points, xs, ys, strict=True) if (p["layers"], p.get("near")) == (layers, near)
        ]:
            axis.plot([x], [y], "o", markersize=14, markerfacecolor="none", color=_INK, markeredgewidth=1.6)
            text = f"{layers} layer{'' if layers == 1 else 's'}"
            axis.annotate(text, (x, y), xytext=(0, -20), textcoords="offset points", ha="center", color=_TEXT)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: _short(value))
        axis.yaxis.set_minor_formatter(lambda value, _: _short(value) if axis.get_ylim()[1] < 10 else "")
        axis.margins(0.06, 0.16)
        axis.set_xlabel("prefill over original, modelled")
        axis.set_ylabel("perplexity over original")
        _quiet(axis, "y")
        return _svg(figure, axis, "curve")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def _quiet(axis: Axes, across: Literal["x", "y"]) -> None:
    axis.grid(axis=across)
    axis.tick_params(which="both", length=0)


def _svg(figure: Figure, axis: Axes, name: str) -> str:
    """Add the legend of `axis`; an <svg> element without metadata, whose ids start with `name`."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False)
    stream = io.StringIO()
    silent = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=silent)
    found = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>\s*<defs>.*?</defs>(.*)</svg>', stream.getvalue(), re.DOTALL)
    assert found is not None, "matplotlib writes an <svg> with a viewBox"
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", found[2].replace("xlink:href", "href"))
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable}, {colour})")
    return f'<svg viewBox="{found[1]}" aria-hidden="true">{body}</svg>'
