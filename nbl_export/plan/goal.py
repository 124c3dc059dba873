"""The number of layers m that a goal replaces, in the order of replacement.

    max-perplexity-increase   m = 1, 2, ... while the increase is shown to be within the goal
    target-speedup            the first m whose modelled speed-up reaches the goal
    kv-budget                 the first m whose caches fit; needs no order

Perplexity uses the maps of the plan before distillation, on the deciding windows of both texts (`text.windows`). These
windows neither order the layers nor give final figures. A count is within the goal if the upper end of its 95%
interval is within the goal on every text.

The choosing windows foresee a count, and the test begins one layer below it. Counts are tested in ascending order, and
the first failure ends the test. A count beyond the goal is taken only if the first count beyond the goal passed. So the
error rate is at most that of one test (Maurer, Hothorn and Lehmacher 1995). Both texts must pass, which needs no
correction either (Berger 1982). If the first count fails, smaller counts are tested downwards until one passes. Each of
them adds the error rate of one more test at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import NblError
from nbl_export.options.goals import CacheBudget, PerplexityIncrease, TargetSpeedup
from nbl_export.plan.inputs import AskedGoal, Maps, Texts
from nbl_export.plan.order import Selection, Task, quiet
from nbl_export.quality import loss_row, spoken_interval, windows_needed

__all__ = ["Reached", "count_for_budget", "count_for_speedup", "count_within"]


@dataclass(frozen=True)
class Reached:
    """The number of layers that a goal replaces, facts for the manifest, and lines for the user."""

    count: int
    facts: dict[str, Any]
    said: tuple[str, ...]


def count_within(asked: AskedGoal, selection: Selection, texts: Texts, task: Task = quiet) -> Reached:
    """The most layers that are shown to raise perplexity by at most the limit on every text.

    Raises:
        NblError: one layer alone is not within the limit.
    """
    assert isinstance(asked.goal, PerplexityIncrease)
    share, text = asked.goal.share, asked.text or _percent(asked.goal.share)
    path = _test(selection, texts, share, task)
    reached = [step for step in path if step["within"]]
    if not reached:
        raise NblError(_unreachable(asked.text, path[0], share))
    best = reached[-1]
    spoken = "; ".join(f"{_spoken(quality_loss)} on {quality_loss['text']}" for quality_loss in best["quality_losses"])
    said = [f"{_layers(best['layers'])} perplexity by {spoken}; {text} is allowed"]
    for step in path:
        if step["layers"] == best["layers"] + 1:
            said.append(f"{step['layers']} layers (with {step['layer']}): {_failure(step, share)}")
    facts = {"max_perplexity_increase": text, "default": asked.text is None, "path": path}
    return Reached(best["layers"], facts, tuple(said))


def count_for_speedup(asked: AskedGoal, selection: Selection, speedup: Callable[[Maps], Any]) -> Reached:
    """The fewest layers whose modelled speed-up reaches the goal.

    Raises:
        NblError: all layers but one do not reach it.
    """
    goal, layers = asked.goal, selection.inputs.num_layers
    assert isinstance(goal, TargetSpeedup)
    smallest = min(selection.maps_of(range(layers)).values(), key=lambda mixer: mixer.work().elements)
    reached = getattr(speedup(dict.fromkeys(range(1, layers), smallest)), goal.phase)
    for count in range(1, layers if reached >= goal.factor else 1):  # an unreachable goal needs no order
        found = speedup(selection.maps_of(selection.order(count)))
        reached = getattr(found, goal.phase)
        if reached >= goal.factor:
            said = f"{count} layers: modelled x{found.prefill:.2f} in prefill, x{found.decode:.2f} in decode"
            speed = {"prefill": found.prefill, "decode": found.decode}
            return Reached(count, {"target_speedup": asked.text, "modelled": speed}, (said,))
    raise NblError(
        f"--target-speedup {asked.text} cannot be met: with {layers - 1} of {layers} attention layers "
        f"replaced, {goal.phase} is modelled at x{reached:.2f}; ask for less"
    )


def count_for_budget(asked: AskedGoal) -> Reached:
    """The fewest layers whose caches fit the budget."""
    assert isinstance(asked.goal, CacheBudget) and asked.fits is not None
    count, kept_bytes = asked.fits
    of = f"{asked.goal.tokens} tokens" if asked.goal.tokens > 1 else "a token"
    said = f"{count} layers: the caches of {of} take {kept_bytes:,} bytes"
    return Reached(count, {"kv_budget": asked.text, "cache_bytes": kept_bytes}, (said,))


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
    return f"--max-perplexity-increase {asked} cannot be met: {alone}; allow more, or try --select greedy"


def _test(selection: Selection, texts: Texts, share: float, task: Task) -> list[dict[str, Any]]:
    """Tested counts in ascending order: up to the first failure, or down to the first success."""
    last = selection.inputs.num_layers - 1
    start = min(last, max(1, selection.foreseen(share) - 1))
    path = _steps(selection, texts, range(start, min(last, start + 1) + 1), share, task)
    while all(step["within"] for step in path) and path[-1]["layers"] < last:
        path += _steps(selection, texts, [path[-1]["layers"] + 1], share, task)
    while not path[0]["within"] and path[0]["layers"] > 1:
        path = _steps(selection, texts, [path[0]["layers"] - 1], share, task) + path[:1]
    failed = next((k for k, step in enumerate(path) if not step["within"]), len(path))
    return path[: failed + 1]


def _steps(selection: Selection, texts: Texts, counts: Sequence[int], share: float, task: Task) -> list[dict[str, Any]]:
    """Quality loss of the first layers of the order on each text, and whether it is shown to be within `share`."""
    orders = {count: selection.order(count) for count in counts}
    losses, said = {}, " or ".join(map(str, counts))
    for name, windows in texts:
        with task(f"replacing {said} layers, on {name}") as progress:
            losses[name] = selection.switched.window_losses(windows, orders, progress)
    return [_step(order, {n: found[count] for n, found in losses.items()}, share) for count, order in orders.items()]


def _step(order: Sequence[int], losses: Mapping[str, Sequence[Any]], share: float) -> dict[str, Any]:
    quality_losses = []
    for name, found in losses.items():
        before, after = ([getattr(v, total) / v.positions for v in found] for total in ("original_sum", "nbl_sum"))
        needed = windows_needed(before, after, share)
        quality_loss = loss_row(name, found)
        quality_losses.append(
            {**quality_loss, "tokens_needed": needed and needed * quality_loss["tokens"] // quality_loss["windows"]}
        )
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
    said = f"{_spoken(worst)} on {worst['text']}"
    if beyond:
        return said
    needed = worst["tokens_needed"]
    more = f", about {_rounded(needed)} would be needed" if needed else ""
    return f"{said}, which {worst['tokens']:,} tokens cannot tell from {_percent(share)}{more}"


def _rounded(count: int) -> str:
    """A count with two digits, because it comes from an estimated spread."""
    return f"{float(f'{count:.1e}'):,.0f}"


def _spoken(quality_loss: Mapping[str, Any]) -> str:
    if quality_loss["increase"] is None:
        return "infinitely much"
    return spoken_interval(quality_loss["increase"], quality_loss["increase_interval"], percent=True, sign=True)


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
