"""eval.json: the result of each model on each task, and differences between models on the same items.

    results      one entry for each (task, limit, variant), with a key of all its inputs
    table        one row for each task and metric: every variant's figure, and NBL minus original on the same items
    length       one row for each test of `length` and position or length, with paired 95% intervals; see `_length`

The scores of all items are one string for each metric, so that the file stays readable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.evaluation.length import POSITION, TESTS
from nbl_export.evaluation.measure import Outcome, paired_difference
from nbl_export.files import read_json
from nbl_export.records.quality import (
    SHORT_TEXT,
    describe_interval,
    grows_with_length,
    increase_interval,
    mean_interval,
)
from nbl_export.records.requests import Subject

__all__ = ["SCHEMA", "entry", "read_entries", "summarize"]

SCHEMA = 1
Entry = dict[str, Any]
Group = dict[str, Entry]  # variant -> entry


def entry(key: str, subject: Subject, variant: str, outcome: Outcome, **facts: Any) -> Entry:
    """The entry of one outcome in eval.json."""
    shown = ("value", "stderr", "aggregation", "higher_is_better")
    metrics = {name: {key: getattr(metric, key) for key in shown} for name, metric in outcome.metrics.items()}
    scores = {name: _pack(metric.items) for name, metric in outcome.metrics.items() if metric.items}
    return {
        "key": key,
        "task": subject.name,
        "limit": subject.limit,
        "variant": variant,
        "items": outcome.items,
        **facts,
        "data": subject.data,
        "config": subject.config,
        "metrics": metrics,
        "scores": scores,
    }


def _pack(rows: Iterable[Any]) -> str:
    """Numbers of an item separated by commas, items separated by spaces."""
    return " ".join(",".join(f"{n:.9g}" for n in np.atleast_1d(np.asarray(row, np.float64))) for row in rows)


def _unpack(text: str) -> list[Any]:
    rows = [[float(n) for n in row.split(",")] for row in text.split()]
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else rows


def read_entries(path: Path) -> dict[str, Entry]:
    """Entries of an eval.json by key; empty if there is no such file.

    Raises:
        CorruptError: the file cannot be used. It is not overwritten, because its figures may have taken hours.
    """
    advice = "restore the file, or move it away to measure everything again"
    try:
        value = read_json(path)
        if value["schema"] != SCHEMA:
            raise CorruptError(f"{path} has schema {value['schema']}, this version reads {SCHEMA}; {advice}")
        entries = {str(e["key"]): e for e in value["results"]}
        json.dumps(summarize(entries), allow_nan=False)  # the entries will be written again
        for found in entries.values():
            list(map(_unpack, found["scores"].values()))
    except FileNotFoundError:
        return {}
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be used ({error!r}); {advice}") from error
    return entries


def summarize(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The content of eval.json."""
    results = list(entries.values())
    groups: dict[str, Group] = {}
    for found in results:  # entries of a group differ in the variant alone, so they are compared item by item
        place = [found["task"], found["limit"], found["data"].get("sha256"), found["items"], found["config"]]
        groups.setdefault(json.dumps(place, sort_keys=True), {})[found["variant"]] = found
    long = {place: next(iter(group.values()))["config"].get("output_type") in TESTS for place, group in groups.items()}
    return {
        "schema": SCHEMA,
        "lm_eval": max((found["config"].get("lm_eval", "") for found in results), default=""),
        "results": results,
        "table": [row for place, group in groups.items() if not long[place] for row in _rows(group)],
        "length": [_length(group) for place, group in groups.items() if long[place]],
    }


def _facts(group: Group) -> dict[str, Any]:
    return {key: next(iter(group.values()))[key] for key in ("task", "limit", "items")}


def _rows(group: Group) -> Iterator[dict[str, Any]]:
    """One row for each metric."""
    first = next(iter(group.values()))
    for name, metric in first["metrics"].items():
        yield {
            **_facts(group),
            "num_fewshot": first["config"].get("num_fewshot"),
            "metric": name,
            "higher_is_better": metric["higher_is_better"],
            "figures": {v: {k: e["metrics"][name][k] for k in ("value", "stderr")} for v, e in group.items()},
            "differences": [_difference(*p, name) for p in _pair(group) if all(name in e["scores"] for e in p)],
        }


def _pair(group: Group) -> list[tuple[Entry, Entry]]:
    """NBL and its original, if both were measured."""
    return [(group["nbl"], group["original"])] if {"nbl", "original"} <= group.keys() else []


def _difference(new: Entry, old: Entry, name: str) -> dict[str, Any]:
    """New minus old with its paired standard error."""
    value, stderr = paired_difference(
        new["metrics"][name]["aggregation"], *(_unpack(e["scores"][name]) for e in (new, old))
    )
    return {"value": value, "stderr": stderr}


def _length(group: Group) -> dict[str, Any]:
    """The value of a test and a text.

    rows: `tokens`, the end of the positions or the length of the items, with the figures of each variant (loss in nats,
    share of correct tokens or keys), and the paired differences of the loss. warnings: one sentence each.
    """
    first = next(iter(group.values()))
    pairs = _pair(group)
    ends = [int(name.split()[1]) for name in first["metrics"] if name.startswith("loss ")]
    return {
        **_facts(group),
        "test": first["config"]["output_type"],
        "rows": [_length_row(group, end) for end in ends],
        "warnings": [warning for pair in pairs if (warning := _warning(*pair, ends))],
    }


def _length_row(group: Group, end: int) -> dict[str, Any]:
    figures = {v: {k: e["metrics"][f"{k} {end}"]["value"] for k in ("loss", "correct")} for v, e in group.items()}
    return {"tokens": end, "figures": figures, "differences": [_loss_difference(*pair, end) for pair in _pair(group)]}


def _loss_difference(new: Entry, old: Entry, end: int) -> dict[str, Any]:
    """Loss after minus loss before, and the increase of perplexity, with paired 95% intervals."""
    rise = _rise(new, old, end)
    loss = mean_interval(rise)
    increase = increase_interval(np.zeros(len(rise)), rise)
    return {
        "loss": loss.value,
        "loss_interval": loss.ends,
        "increase": increase.value,
        "increase_interval": increase.ends,
    }


def _rise(new: Entry, old: Entry, end: int) -> np.ndarray:
    """Loss after minus loss before [items], in nats."""
    after, before = (np.array(_unpack(e["scores"][f"loss {end}"]), np.float64) for e in (new, old))
    return np.asarray(after - before)


def _warning(new: Entry, old: Entry, ends: list[int]) -> str | None:
    """One sentence if a test's loss grows with length; else None."""
    short_ends = [end for end in ends if end <= SHORT_TEXT]
    most = ends[-1]
    if not short_ends or most <= SHORT_TEXT:
        return None
    counts = np.diff((1, *short_ends))
    short_W = np.average([_rise(new, old, end) for end in short_ends], axis=0, weights=counts)
    if not grows_with_length(short_W, _rise(new, old, most)):
        return None
    test, _, text = new["task"].partition(":")
    if test == POSITION:
        none = np.zeros(len(short_W))
        rises = (increase_interval(none, rise_W) for rise_W in (short_W, _rise(new, old, most)))
        small, large = (describe_interval(rise.value, rise.ends, percent=True, sign=True) for rise in rises)
        said = (
            f"perplexity rises by {small} at positions below {SHORT_TEXT}, "
            f"but by {large} at positions from {ends[-2]:,} on"
        )
    else:
        shares = (e["metrics"][f"correct {end}"]["value"] for end in (SHORT_TEXT, most) for e in (old, new))
        short, short_nbl, long, long_nbl = (f"{share:.0%}" for share in shares)
        said = (
            f"{test} is correct in {long_nbl} instead of the original's {long} in {most:,} tokens, and in {short_nbl} "
            f"instead of {short} in {SHORT_TEXT}"
        )
    return (
        f"the loss grows with length: {f'on {text}, ' if text else ''}{said}; use short texts, or replace other layers"
    )
