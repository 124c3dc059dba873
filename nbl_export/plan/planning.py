"""The plan of a model, and a sweep of its quality against speed, from declared inputs.

    moments ─► scores ─► order (`select`) ─► its first m layers, or the named layers ─► maps
                           └─► curve of quality against speed

A sweep covers 0, 1, ... m layers of one order: fitted maps, attention dropped in the same order, and the run's
distilled maps if there are any. KL and perplexity come from the deciding windows of each text, speed-ups from a cost
model.

Maps are distilled together for m layers. For slightly fewer layers, these maps are nearly as good as maps distilled
for these layers alone (10 of 12); for far fewer layers, half as good (4 of 12; docs/experiments.md). So one
distillation gives a curve up to m that is too low at its lower end.

The windows (`text.windows`) neither order the layers nor judge the training. Final figures use other windows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from nbl_export.mixers.base import Mixer
from nbl_export.model.switched import SwitchedModel
from nbl_export.options.goals import DEFAULT_INCREASE, CacheBudget, TargetSpeedup
from nbl_export.plan.choose import a_quarter, choose
from nbl_export.plan.goal import Reached, count_for_budget, count_for_speedup, count_within
from nbl_export.plan.inputs import MapKind, Maps, PlanInputs, SweepInputs
from nbl_export.plan.order import Selection, Task, quiet
from nbl_export.quality import loss_row
from nbl_export.records.plan import Plan

__all__ = ["RECOMMENDED_INCREASE", "make_plan", "recommend", "sweep"]

RECOMMENDED_INCREASE = DEFAULT_INCREASE  # largest perplexity increase, on the worse text
Say = Callable[[str], None]


def make_plan(
    inputs: PlanInputs, selection: Selection, say: Say, task: Task = quiet
) -> tuple[Plan, dict[int, Mixer], dict[str, Any]]:
    """The plan, the maps of its layers, and further facts for the manifest.

    Raises:
        NblError: the goal cannot be met.
    """
    request, goal = inputs.request, None
    if request is None and inputs.goal.text is None and inputs.quarter.value:
        request = a_quarter(selection.inputs.num_layers)
    if request is None:
        reached = _count(inputs, selection, task)
        for line in reached.said:
            say(line)
        request, goal = reached.count, reached.facts
    order = selection.order(request) if isinstance(request, int) else None
    if order and selection.judges:
        selection.outlook(len(order))
    select = "given" if order is None else selection.select
    asked = selection.inputs.kind
    plan = choose(selection.scores, request, asked.tap, select, order, asked.kind)
    facts = selection.facts(inputs.speedup, inputs.setting)
    maps = selection.maps_of(plan.replaced)
    ranks = {str(i): m.rank for i, m in maps.items() if m.rank is not None}
    return plan, maps, {**facts, "ranks": ranks, "goal": goal}


def _count(inputs: PlanInputs, selection: Selection, task: Task) -> Reached:
    if isinstance(inputs.goal.goal, CacheBudget):
        return count_for_budget(inputs.goal)
    if isinstance(inputs.goal.goal, TargetSpeedup):
        return count_for_speedup(inputs.goal, selection, inputs.speedup.value)
    return count_within(inputs.goal, selection, inputs.deciding.value, task)


# -- sweep -----------------------------------------------------------------------------------------------------


def sweep(inputs: SweepInputs, fitted: Selection, titles: Mapping[str, str], task: Task = quiet) -> dict[str, Any]:
    """The content of sweep.json.

    Args:
        fitted: of `inputs.order`.
        titles: "nbl", "drop" and "distilled" in words, for the progress.
    """
    zeros = dataclasses.replace(inputs.order, kind=MapKind("none", inputs.order.kind.tap))
    dropped = Selection(zeros, task)
    order, texts = fitted.order(inputs.count), inputs.deciding.value
    sets = {m: order[:m] for m in range(inputs.count + 1)}
    points: list[dict[str, Any]] = []
    for method, selection in (("nbl", fitted), ("drop", dropped)):
        losses = _losses(selection.switched, sets, inputs, titles[method], task)
        points += _points(inputs, method, selection.maps_of(order), sets, losses)
    points += _distilled(inputs, fitted, titles, task)
    return {
        "select": fitted.select,
        "tap": inputs.order.kind.tap,
        "order": list(order),
        "tokens": inputs.tokens,
        "texts": [name for name, _ in texts],
        "points": points,
        "recommended": recommend(points),
        "recommended_increase": RECOMMENDED_INCREASE,
    }


def _distilled(inputs: SweepInputs, fitted: Selection, titles: Mapping[str, str], task: Task) -> list[dict[str, Any]]:
    """Points of trained maps: all of them, and the first 1, 2, ... `count` layers if an order chose them."""
    if inputs.distilled is None:
        return []
    replaced, maps = inputs.distilled.replaced, inputs.distilled.maps.value
    trained = len(replaced)
    order = () if inputs.distilled.select == "given" else fitted.order(trained)
    sets: dict[int, Sequence[int]] = {trained: replaced}
    if set(order) == set(replaced):
        sets = {**{m: order[:m] for m in range(1, min(inputs.count + 1, trained))}, **sets}
    switched = SwitchedModel(inputs.order.model.value, maps, inputs.order.kind.tap, narrow=inputs.order.narrow.value)
    found = _points(inputs, "distilled", maps, sets, _losses(switched, sets, inputs, titles["distilled"], task))
    return [{**point, "distilled_for": trained} for point in found]


def _losses(
    switched: SwitchedModel, sets: Mapping[int, Collection[int]], inputs: SweepInputs, title: str, task: Task
) -> dict[str, Any]:
    """The losses of each set, window by window, on each text."""
    found = {}
    for name, windows in inputs.deciding.value:
        with task(f"{title} on {name}") as progress:
            found[name] = switched.window_losses(windows, sets, progress)
    return found


def _points(
    inputs: SweepInputs, method: str, maps: Maps, sets: Mapping[int, Collection[int]], losses: Mapping[str, Any]
) -> list[dict[str, Any]]:
    found = []
    for count, replaced in sets.items():
        chosen = {i: maps[i] for i in replaced}
        speed = inputs.speedup.value(chosen)
        quality_losses = [loss_row(name, loss[count]) for name, loss in losses.items()]
        found.append({
            "method": method,
            "layers": count,
            "replaced_layers": sorted(replaced),
            "prefill": speed.prefill,
            "prefill_tail_pruned": inputs.pruned_speedup.value(chosen).prefill,
            "decode": speed.decode,
            "quality_losses": quality_losses,
            "worst_increase": _worst(p["increase"] for p in quality_losses),
            "worst_upper": _worst((p["increase_interval"] or [None, None])[1] for p in quality_losses),
        })  # fmt: skip
    return found


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest value; None if a value is None."""
    found = list(values)
    known = [v for v in found if v is not None]
    return max(known) if len(known) == len(found) else None


def recommend(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The most layers that are shown to raise perplexity by at most `RECOMMENDED_INCREASE` on every text, or None.

    Each method is tested with 1, 2, ... layers by the upper end of the 95% interval on the worse text. The first
    failure ends a method (as in `goal`). With two methods, fitted and distilled maps, the error rate is at most twice
    that of one test. Of two points with equally many layers, the lower increase is recommended. Dropped attention is
    only a comparison and never recommended.
    """
    good: list[Mapping[str, Any]] = []
    for method in ("nbl", "distilled"):
        for p in sorted((p for p in points if p["method"] == method and p["layers"]), key=lambda p: p["layers"]):
            if p["worst_upper"] is None or p["worst_upper"] > RECOMMENDED_INCREASE:
                break
            good.append(p)
    best = max(good, key=lambda p: (p["layers"], -p["worst_increase"]), default=None)
    return None if best is None else {"method": best["method"], "layers": best["layers"]}
