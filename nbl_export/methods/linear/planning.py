"""The plan of a model, from declared inputs.

    moments ─► scores ─► order (`select`) ─► its first m layers, or the named layers ─► maps
                           └─► curve of quality against speed

A limit on quality sets the number of layers m, in the order of replacement: m = 1, 2, ... while the increase of
perplexity is shown to be within the limit (`methods.choose`).

Maps in closed form: the selection windows estimate a count, and the test begins one layer below it. Counts are tested
in ascending order, and the first failure ends the test. So the error rate is at most that of one test (Maurer, Hothorn
and Lehmacher 1995). If the first count fails, smaller counts are tested downwards until one passes. Each of them adds
the error rate of one more test at most.

Maps that are trained: as many layers begin as raise perplexity by at most `HOPE` times the limit in closed form. Partly
through the training, the selection windows say how many of them stay (`choose.count_estimated`). At the end, counts are
tested downwards until one passes (`choose.count_trained`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nbl_export.methods.base import Choice, ChoiceInputs, Say, Task
from nbl_export.methods.choose import Step, reached, steps_of_sets
from nbl_export.methods.linear.order import Selection, plan_of, quiet

__all__ = ["HOPE", "make_plan"]

HOPE = 2.5  # the increase in closed form that training may bring within a limit, over the limit


def make_plan(inputs: ChoiceInputs, selection: Selection, say: Say, task: Task = quiet) -> Choice:
    """The plan, the maps of its layers, and further facts for the manifest.

    Raises:
        NblError: the limit cannot be met.
    """
    asked = selection.asked
    request = asked.request
    goal: dict[str, Any] | None = None
    if request is None:
        if inputs.trains.value and selection.judges:
            request = max(1, selection.expected_count(HOPE * inputs.limit.share))
            goal = _to_train(inputs, selection, request)
            allowed = inputs.limit.text or inputs.limit.percent
            said = [
                f"training begins with {request} of {inputs.num_layers} layers, and gives back what is beyond {allowed}"
            ]
        else:
            request, goal, said = reached(_test(inputs, selection, task), inputs.limit)
        for line in said:
            say(line)
    order = selection.order(request) if isinstance(request, int) else None
    plan = plan_of(selection.scores, request, asked.tap, asked.select, order)
    return Choice(plan, selection.maps_of(plan.layers), {**selection.facts(), "goal": goal})


def _to_train(inputs: ChoiceInputs, selection: Selection, count: int) -> dict[str, Any]:
    """The goal of maps that will be trained."""
    return {**inputs.limit.facts, "order": list(selection.order(count)), "share": inputs.limit.share, "path": []}


def _test(inputs: ChoiceInputs, selection: Selection, task: Task) -> list[Step]:
    """Tested counts in ascending order: up to the first failure, or down to the first success."""
    last = inputs.num_layers - 1
    share = inputs.limit.share
    start = min(last, max(1, selection.expected_count(share) - 1))

    def steps(counts: Iterable[int]) -> list[Step]:
        orders = [selection.order(count) for count in counts]
        return steps_of_sets(selection.partial, inputs.validation.value, orders, share, task)

    path = steps(range(start, min(last, start + 1) + 1))
    while all(tested["within"] for tested in path) and path[-1]["layers"] < last:
        path += steps([path[-1]["layers"] + 1])
    while not path[0]["within"] and path[0]["layers"] > 1:
        path = steps([path[0]["layers"] - 1]) + path[:1]
    failed = next((k for k, tested in enumerate(path) if not tested["within"]), len(path))
    return path[: failed + 1]
