"""Tables of experiments with exit layers: who continues, and four ways to give skipped tokens keys."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tables_quality import spearman

Read = Callable[[str], Any]
Rows = list[Sequence[str]]

MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B"}
_RETRIEVAL = ("items: pairs", "items: variables", "KV retrieval", "NIAH multikey", "VT", "CWE")
_ITEMS = ("items: pairs", "items: variables", "items: sentences")
_ORDINARY = ("WikiText-2", "documentation")


def continuing(read: Read) -> Rows:
    """Rise of loss by who continues above an exit layer, in nats, with a standard error over windows."""
    texts = read("continuing-smollm2")["windows"]
    rows: Rows = [("who continues", *texts, "documentation, last 32 of 128"), "l" + "r" * (1 + len(texts))]
    for who in next(iter(texts.values()))[0]:
        if who != "original":
            whole = [_rise(windows, who, slice(None)) for windows in texts.values()]
            rows.append((who, *whole, _rise(texts["documentation"], who, slice(-1, None))))
    return rows


def _rise(windows: Sequence[Mapping[str, Sequence[float]]], who: str, quarters: slice) -> str:
    each = [float(np.mean(w[who][quarters]) - np.mean(w["original"][quarters])) for w in windows]
    return f"{statistics.mean(each):+.2f} ± {statistics.stdev(each) / len(each) ** 0.5:.2f}".replace("-", "−")


def step_rows(read: Read) -> Rows:
    """Time of a step by its rows."""
    found = read("step-rows-smollm2")
    medians = {count: statistics.median(times) for count, times in found["ms"].items()}
    rows: Rows = [("rows", "ms", "over one row", "the same, for half of the layers"), "rrrr"]
    for count, ms in medians.items():
        ratio = ms / medians["1"]
        rows.append((count, f"{ms:.1f}", f"×{ratio:.2f}", f"×{(1 + ratio) / 2:.2f}"))
    return rows


def _tasks(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Items by task; the lengths of a task are joined."""
    joined: dict[str, list[Mapping[str, Any]]] = {}
    for title, items in found["tasks"].items():
        joined.setdefault(title.split(",")[0], []).extend(items)
    return joined


def _named(items: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    return (name for name in items[0] if name != "tokens")


def equal_work(read: Read) -> Rows:
    """Loss of answers by the original, and its rise by each way to give skipped tokens keys."""
    rows: Rows = []
    for name, title in MODELS.items():
        tasks = _tasks(read(f"equal-work-{name}"))
        if not rows:
            rows = [("model", "keys of skipped tokens, exit layer:recent tokens", *tasks), "ll" + "r" * len(tasks)]
        for way in _named(tasks["WikiText-2"]):
            if way == "original":
                said = (
                    f"{np.mean([i[way][0] for i in items]):.2f}; {np.mean([i[way][1] for i in items]):.0%}"
                    for items in tasks.values()
                )
            else:
                said = (f"{_mean_rise(items, way):+.2f}".replace("-", "−") for items in tasks.values())
            rows.append((title, way, *said))
    return rows


def _mean_rise(items: Sequence[Mapping[str, Any]], way: str) -> float:
    return float(np.mean([item[way][0] - item["original"][0] for item in items]))


def equal_work_ranks(read: Read) -> Rows:
    """Spearman's rank correlation over all ways and exit layers: what a choice may see, and what a task loses."""
    rows: Rows = []
    for name, title in MODELS.items():
        tasks = _tasks(read(f"equal-work-{name}"))
        ways = [way for way in _named(tasks["WikiText-2"]) if way != "original"]
        judged = [task for task in tasks if task not in (*_ITEMS, *_ORDINARY)]
        if not rows:
            rows = [("model", "what a choice sees", *judged), "ll" + "r" * len(judged)]
        for seen, groups in (("retrieval items", _ITEMS), ("perplexity of both texts", _ORDINARY)):
            values = [sum(_mean_rise(tasks[group], way) for group in groups) for way in ways]
            found = (spearman(values, [_mean_rise(tasks[task], way) for way in ways]) for task in judged)
            rows.append((title, seen, *(f"{value:+.2f}".replace("-", "−") for value in found)))
    return rows


def worst_retrieval(read: Read, model: str, exit_layer: int, recent_tokens: int) -> str:
    """The retrieval task of which an exit layer with predicted KV loses most, in nats a token of the answer."""
    (name,) = (name for name, title in MODELS.items() if title == model)
    tasks = _tasks(read(f"equal-work-{name}"))
    rises = {task: _mean_rise(tasks[task], f"predicted KV, {exit_layer}:{recent_tokens}") for task in _RETRIEVAL}
    worst = max(rises, key=lambda task: rises[task])
    return f"{rises[worst]:+.2f} ({worst.removeprefix('items: ')})".replace("-", "−")
