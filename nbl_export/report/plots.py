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

__all__ = ["curve", "throughput"]

_NBL = "#1b6ec2"
_ORIGINAL = "#c9a66b"
_INK = "#17212b"
_TEXT = "#53606c"
_GRID = "#dce1e6"
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
        figure = Figure(figsize=(_WIDTH, 0.45 + 0.25 * len(panels) + 0.66 * sum(heights)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axis, (title, chosen) in zip(axes, panels, strict=True):
            _bars(axis, chosen, {(r["test"], r["depth"]): r["text"] for r in ratios})
            axis.set_title(title, loc="left", fontsize=11.5, weight="bold")
            axis.set_xlabel("tokens per second")
        return _svg(figure, axes[0], "throughput")


def _bars(axis: Axes, rows: Sequence[dict[str, Any]], texts: dict[tuple[str, int], str]) -> None:
    groups = list(dict.fromkeys((r["test"], r["depth"]) for r in rows))
    highest = max(max(r["samples"]) for r in rows)
    named: set[str] = set()
    for row in rows:
        variant = row["variant"]
        median = row["tokens_per_second_median"]
        samples = row["samples"]
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
    axis.set_yticks(
        range(len(groups)),
        [f"{int(test[2:]):,} tokens" + f"\nbehind {depth:,}" * (depth > 0) for test, depth in groups],
    )
    axis.set_ylim(len(groups) - 0.45, -0.55)
    axis.spines["bottom"].set_visible(False)
    _quiet(axis, "x")


def curve(points: Sequence[dict[str, Any]], layers: int, recent_tokens: int | None = None) -> str:
    """Draw the perplexity over the original's (logarithmic) against the modelled prefill speed-up, as SVG.

    Args:
        points: those of the manifest's curve.
        layers, recent_tokens: number of layers, and of recent tokens with an exit layer, of the point to ring.
    """
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
        axis = figure.subplots()
        xs = [p["prefill"] for p in points]
        ys = [1 + max(p["increases"]) for p in points]
        joined = "none" if recent_tokens else "-"  # two exit layers are not more and less of one thing
        axis.plot(xs, ys, linestyle=joined, marker="o", color=_NBL, markersize=5, label=_NAMES["nbl"])
        for x, y in [
            (x, y)
            for p, x, y in zip(points, xs, ys, strict=True)
            if (p["layers"], p.get("recent_tokens")) == (layers, recent_tokens)
        ]:
            axis.plot([x], [y], "o", markersize=14, markerfacecolor="none", color=_INK, markeredgewidth=1.6)
            text = "this run" if recent_tokens else f"{layers} layer{'' if layers == 1 else 's'}"
            axis.annotate(text, (x, y), xytext=(11, -4), textcoords="offset points", color=_TEXT)
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
