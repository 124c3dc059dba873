"""The plan of a model, from declared inputs.

    moments ─► scores ─► order (`select`) ─► its first m layers, or the named layers ─► maps
                           └─► curve of quality against speed

A goal sets the number of layers m, in the order of replacement: m = 1, 2, ... while the increase of perplexity is shown
to be within the goal.

Perplexity uses the validation windows of both texts (`held_out`). These windows neither order the layers nor give final
figures. A count is within the goal if the upper end of its 95% interval is within the goal on every text. Both texts
must pass, which needs no correction (Berger 1982).

Maps in closed form: the selection windows foresee a count, and the test begins one layer below it. Counts are tested in
ascending order, and the first failure ends the test. So the error rate is at most that of one test (Maurer, Hothorn and
Lehmacher 1995). If the first count fails, smaller counts are tested downwards until one passes. Each of them adds the
error rate of one more test at most.

Maps that are trained: as many layers begin as raise perplexity by at most `HOPE` times the limit in closed form. Partly
through the training, the selection windows say how many of them stay (`count_foreseen`). At the end, counts are tested
downwards until one passes (`count_trained`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.base import Mixer
from nbl_export.methods.inputs import AskedGoal, PlanInputs, Task, Texts
from nbl_export.methods.linear.order import Selection, choose, quiet
from nbl_export.methods.losses import PartialReplacement
from nbl_export.records.plan import Plan
from nbl_export.records.quality import loss_row, spoken_increase

__all__ = ["HOPE", "Reached", "count_foreseen", "count_trained", "count_within", "make_plan"]

HOPE = 2.5  # the increase in closed form that training may bring within a limit, over the limit
Say = Callable[[str], None]


def make_plan(
    inputs: PlanInputs, selection: Selection, say: Say, task: Task = quiet
) -> tuple[Plan, dict[int, Mixer], dict[str, Any]]:
    """The plan, the maps of its layers, and further facts for the manifest.

    Raises:
        NblError: the goal cannot be met.
    """
    request = inputs.request
    goal = None
    if request is None:
        reached = _count(inputs, selection, task)
        for line in reached.lines:
            say(line)
        request = reached.count
        goal = reached.facts
    order = selection.order(request) if isinstance(request, int) else None
    select = selection.inputs.select
    asked = selection.inputs.kind
    plan = choose(selection.scores, request, asked.tap, select, order, asked.kind)
    facts = selection.facts(inputs.speedup, inputs.setting)
    maps = selection.maps_of(plan.layers)
    return plan, maps, {**facts, "goal": goal}


def _count(inputs: PlanInputs, selection: Selection, task: Task) -> Reached:
    if inputs.trains.value and selection.judges and (found := _count_to_train(inputs.goal, selection)).count:
        return found
    return count_within(inputs.goal, selection, inputs.validation.value, task)


# -- goals -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """The number of layers that a goal replaces, facts for the manifest, and lines for the user."""

    count: int
    facts: dict[str, Any]
    lines: tuple[str, ...]


def count_within(asked: AskedGoal, selection: Selection, texts: Texts, task: Task = quiet) -> Reached:
    """The most layers that are shown to raise perplexity by at most the limit on every text.

    Raises:
        NblError: one layer alone is not within the limit.
    """
    share = asked.share
    text = asked.text or _percent(asked.share)
    path = _test(selection, texts, share, task)
    return _reached(path, {"max_perplexity_increase": text, "default": asked.text is None}, share)


def _reached(path: list[dict[str, Any]], goal: Mapping[str, Any], share: float) -> Reached:
    """The last step within the limit, of tested steps in ascending order."""
    reached = [step for step in path if step["within"]]
    text = goal["max_perplexity_increase"]
    if not reached:
        raise NblError(_unreachable(None if goal["default"] else text, path[0], share))
    best = reached[-1]
    spoken = "; ".join(
        f"{spoken_increase(quality_loss)} on {quality_loss['text']}" for quality_loss in best["quality_losses"]
    )
    said = [f"{_layers(best['layers'])} perplexity by {spoken}; {text} is allowed"]
    for step in path:
        if step["layers"] == best["layers"] + 1:
            said.append(f"{step['layers']} layers (with {step['layer']}): {_failure(step, share)}")
    return Reached(best["layers"], {**goal, "path": path}, tuple(said))


def _count_to_train(asked: AskedGoal, selection: Selection) -> Reached:
    """The layers that training begins with."""
    share = asked.share
    text = asked.text or _percent(asked.share)
    count = max(1, selection.expected_count(HOPE * share))
    facts = {"max_perplexity_increase": text, "default": asked.text is None, "order": list(selection.order(count))}
    layers = selection.inputs.num_layers
    said = f"training begins with {count} of {layers} layers, and gives back what is beyond {text}"
    return Reached(count, {**facts, "share": share, "path": []}, (said,))


def count_foreseen(
    partial: PartialReplacement, order: Sequence[int], goal: Mapping[str, Any], texts: Texts, task: Task = quiet
) -> int:
    """The most first layers of an order, at least 1, that keep the limit of `goal` on every selection text."""
    sets = {count: order[:count] for count in range(1, len(order) + 1)}
    within = dict.fromkeys(sets, True)
    for name, windows in texts:
        with task(f"{len(sets)} sets of layers, on {name}") as progress:
            for count, loss in partial.quality_losses(windows, sets, progress).items():
                before, after = loss.perplexities
                within[count] &= after / before - 1 <= goal["share"]  # False for NaN
    return max([count for count, kept in within.items() if kept], default=1)


def count_trained(
    partial: PartialReplacement, order: Sequence[int], goal: Mapping[str, Any], texts: Texts, task: Task = quiet
) -> Reached:
    """The most first layers of an order that are shown to keep the limit of `goal`, with maps that were trained.

    Raises:
        NblError: one layer alone is not within the limit.
    """
    path: list[dict[str, Any]] = []
    while not (path and path[0]["within"]) and len(order) - len(path) > 0:
        path = _steps(partial, texts, [order[: len(order) - len(path)]], goal["share"], task) + path
    return _reached(path, goal, goal["share"])


def _layers(count: int) -> str:
    return f"{count} layers raise" if count > 1 else "1 layer raises"


def _unreachable(asked: str | None, step: Mapping[str, Any], share: float) -> str:
    failure = _failure(step, share)
    alone = f"one layer alone ({step['layer']}) raises perplexity on held-back text by {failure}"
    if asked is None:
        return (
            f"no layer can be replaced within the default limit of {_percent(share)}: {alone}; ask for a number with "
            "--layers N, or allow more with --max-perplexity-increase"
        )
    return f"--max-perplexity-increase {asked} cannot be met: {alone}; allow more, or leave the key select out"


def _test(selection: Selection, texts: Texts, share: float, task: Task) -> list[dict[str, Any]]:
    """Tested counts in ascending order: up to the first failure, or down to the first success."""
    last = selection.inputs.num_layers - 1
    start = min(last, max(1, selection.expected_count(share) - 1))

    def steps(counts: Iterable[int]) -> list[dict[str, Any]]:
        return _steps(selection.partial, texts, [selection.order(count) for count in counts], share, task)

    path = steps(range(start, min(last, start + 1) + 1))
    while all(step["within"] for step in path) and path[-1]["layers"] < last:
        path += steps([path[-1]["layers"] + 1])
    while not path[0]["within"] and path[0]["layers"] > 1:
        path = steps([path[0]["layers"] - 1]) + path[:1]
    failed = next((k for k, step in enumerate(path) if not step["within"]), len(path))
    return path[: failed + 1]


def _steps(
    partial: PartialReplacement, texts: Texts, found: Sequence[Sequence[int]], share: float, task: Task
) -> list[dict[str, Any]]:
    """Quality loss of some sets on each text, and whether it is shown to be within `share`."""
    orders = {len(order): order for order in found}
    losses = {}
    said = " or ".join(map(str, orders))
    for name, windows in texts:
        with task(f"replacing {said} layers, on {name}") as progress:
            losses[name] = partial.window_losses(windows, orders, progress)
    return [_step(order, {n: found[count] for n, found in losses.items()}, share) for count, order in orders.items()]


def _step(order: Sequence[int], losses: Mapping[str, Sequence[Any]], share: float) -> dict[str, Any]:
    quality_losses = [loss_row(name, found) for name, found in losses.items()]
    within = all(_verdict(quality_loss, share) == "within" for quality_loss in quality_losses)
    return {"layers": len(order), "layer": order[-1], "within": within, "quality_losses": quality_losses}


def _verdict(quality_loss: Mapping[str, Any], share: float) -> str:
    if quality_loss["increase"] is None:
        return "beyond"
    low, high = quality_loss["increase_interval"] or (-math.inf, math.inf)
    return "within" if high <= share else "beyond" if low > share else "undecided"


def _failure(step: Mapping[str, Any], share: float) -> str:
    """Why a step fails: the worst text beyond the share, or the worst text with an undecided result."""
    verdicts = [(_verdict(quality_loss, share), quality_loss) for quality_loss in step["quality_losses"]]
    beyond = [quality_loss for verdict, quality_loss in verdicts if verdict == "beyond"]
    chosen = beyond or [quality_loss for verdict, quality_loss in verdicts if verdict == "undecided"]
    worst = max(
        chosen, key=lambda quality_loss: math.inf if quality_loss["increase"] is None else quality_loss["increase"]
    )
    said = f"{spoken_increase(worst)} on {worst['text']}"
    return said if beyond else f"{said}, which {worst['tokens']:,} tokens cannot tell from {_percent(share)}"


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
