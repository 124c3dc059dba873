"""Quality loss and modelled speed of every number of replaced layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nbl_export.measure.rows import spoken_ratio
from nbl_export.report import words
from nbl_export.report.blocks import (
    Column,
    Details,
    Figure,
    Figures,
    Paragraph,
    Section,
    Table,
)
from nbl_export.text.window_intervals import spoken_interval

__all__ = ["sections"]

_FIGURE = Figure(
    "tradeoff",
    "Perplexity over the original's, on the text with the largest increase, against the modelled speed-up of prefill. "
    "A point is a number of layers, its whisker the 95% interval. The ring marks the recommended count.",
)


def sections(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, or none if no sweep was made."""
    sweep = report["sweep"]
    if not sweep:
        return ()
    numbers = ("Layers", "Prefill", "Tail-pruned", "Decode", "Perplexity", "Increase", "KL (nats)")
    columns: tuple[Column | str, ...] = ("Maps", Column("Text", "wrap"), *Column.numbers(*numbers))
    points = Table.of(columns, [row for point in sweep["points"] for row in _rows(point)])
    note = Paragraph(" ".join(_note(sweep)))
    return (
        Section("Quality against speed", (note, Figures((_FIGURE,)), Details("All points of the sweep", (points,)))),
    )


def _note(sweep: Mapping[str, Any]) -> Iterator[str]:
    yield f"Quality loss and modelled speed of 0, 1, ... replaced layers, in the order {words.listed(sweep['order'])}."
    yield f"Speed is modelled from arithmetic and bytes: a prefill of {sweep['tokens']} tokens, then one decode step."
    yield "The text of the sweep chose no layer and fitted no map."
    yield "The quality loss above was measured on other text."
    best, allowed = sweep["recommended"], words.percent(sweep["recommended_increase"])
    if best:
        yield f"Recommended: {best['layers']} {words.plural('layer', best['layers'])} ({best['method']})."
        yield "Counts of layers were tested from 1 upwards."
        yield (
            f"Up to the recommended count, the 95% interval of the perplexity increase stays within {allowed} "
            "on every text."
        )
    else:
        yield (
            f"None is recommended: with one layer the 95% interval of the perplexity increase reaches beyond {allowed} "
            "on some text."
        )
    trained = next((p["distilled_for"] for p in sweep["points"] if "distilled_for" in p), 1)
    if trained > 1:
        yield f"Distilled maps are this run's own, trained together for {trained} layers."
        yield "Fewer layers do better if they are distilled by themselves."


def _rows(point: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    trained = point.get("distilled_for", point["layers"])
    maps = point["method"] + (f" for {trained}" if trained != point["layers"] else "")
    speeds = [spoken_ratio(point[name]) for name in ("prefill", "prefill_tail_pruned", "decode")]
    for loss in point["prices"]:
        rise = spoken_interval(loss["increase"], loss["increase_interval"], percent=True, sign=True)
        perplexity = words.number(loss["perplexity"], "not finite")
        kl = spoken_interval(loss["kl"], loss["kl_interval"])
        yield maps, loss["text"], str(point["layers"]), *speeds, perplexity, rise, kl
