"""The number of layers m that a goal replaces, in the order of replacement.

    max-perplexity-increase   m = 1, 2, ... while the increase is shown to be within the goal
    target-speedup            the first m whose modelled speed-up reaches the goal
    kv-budget                 the first m whose caches fit; needs no order

Perplexity uses the maps of the plan before distillation, on the deciding windows of both texts (`held_back`). These
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
from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.errors import NblError
from nbl_export.options.goals import (
    DEFAULT_INCREASE,
    CacheBudget,
    PerplexityIncrease,
    TargetSpeedup,
    goal_of,
    layers_for_budget,
)
from nbl_export.run.job import Job
from nbl_export.run.stages.common import cost_of
from nbl_export.text.window_intervals import spoken_interval, windows_needed
from nbl_export.verify.perplexity import mix_price

__all__ = ["count_for_goal"]


def count_for_goal(job: Job, selection: Any) -> tuple[int, dict[str, Any]]:
    """The number of layers that the job's goal replaces, and facts for the manifest; `DEFAULT_INCREASE` without a goal.

    Args:
        selection: the job's `selection.Selection`.

    Raises:
        NblError: the goal cannot be met; the message has the nearest result.
    """
    goal = goal_of(job.options) or PerplexityIncrease(DEFAULT_INCREASE)
    if isinstance(goal, PerplexityIncrease):
        return _within_increase(job, selection, goal)
    if isinstance(goal, TargetSpeedup):
        return _fast_enough(job, selection, goal)
    assert isinstance(goal, CacheBudget)
    return _small_enough(job, goal)


def _within_increase(job: Job, selection: Any, goal: PerplexityIncrease) -> tuple[int, dict[str, Any]]:
    asked = job.options.max_perplexity_increase or _percent(goal.share)
    path = _test(job, selection, goal.share)
    reached = [step for step in path if step["within"]]
    if not reached:
        raise NblError(_unreachable(job, path[0], goal.share))
    best = reached[-1]
    said = "; ".join(f"{_spoken(price)} on {price['text']}" for price in best["prices"])
    job.ui.say(f"  {_layers(best['layers'])} perplexity by {said}; {asked} is allowed")
    for step in path:
        if step["layers"] == best["layers"] + 1:
            job.ui.say(f"  {step['layers']} layers (with {step['layer']}): {_failure(step, goal.share)}")
    by_default = job.options.max_perplexity_increase is None
    return best["layers"], {"max_perplexity_increase": asked, "default": by_default, "path": path}


def _layers(count: int) -> str:
    return f"{count} layers raise" if count > 1 else "1 layer raises"


def _unreachable(job: Job, step: Mapping[str, Any], share: float) -> str:
    asked, failure = job.options.max_perplexity_increase, _failure(step, share)
    alone = f"one layer alone ({step['layer']}) raises perplexity on held-back text by {failure}"
    if asked is None:
        return (
            f"no layer can be replaced within the default limit of {_percent(share)}: {alone}; ask for a number with "
            "--layers N, or allow more with --max-perplexity-increase"
        )
    return f"--max-perplexity-increase {asked} cannot be met: {alone}; allow more, or try --select greedy"


def _test(job: Job, selection: Any, share: float) -> list[dict[str, Any]]:
    """Tested counts in ascending order: up to the first failure, or down to the first success."""
    texts, last = job.texts("deciding"), job.spec.num_layers - 1
    start = min(last, max(1, selection.foreseen(share) - 1))
    path = _steps(job, selection, texts, range(start, min(last, start + 1) + 1), share)
    while all(step["within"] for step in path) and path[-1]["layers"] < last:
        path += _steps(job, selection, texts, [path[-1]["layers"] + 1], share)
    while not path[0]["within"] and path[0]["layers"] > 1:
        path = _steps(job, selection, texts, [path[0]["layers"] - 1], share) + path[:1]
    failed = next((k for k, step in enumerate(path) if not step["within"]), len(path))
    return path[: failed + 1]


def _steps(
    job: Job, selection: Any, texts: Sequence[tuple[str, Any]], counts: Sequence[int], share: float
) -> list[dict[str, Any]]:
    """Quality loss of the first layers of the order on each text, and whether it is shown to be within `share`."""
    orders = {count: selection.order(count) for count in counts}
    losses, said = {}, " or ".join(map(str, counts))
    for name, windows in texts:
        with job.ui.task(f"replacing {said} layers, on {name}") as progress:
            losses[name] = selection.switched.window_losses(windows, orders, progress)
    return [_step(order, {n: found[count] for n, found in losses.items()}, share) for count, order in orders.items()]


def _step(order: Sequence[int], losses: Mapping[str, Sequence[Any]], share: float) -> dict[str, Any]:
    prices = []
    for name, found in losses.items():
        before, after = ([getattr(v, total) / v.positions for v in found] for total in ("original_sum", "mix_sum"))
        needed = windows_needed(before, after, share)
        price = mix_price(name, found)
        prices.append({**price, "tokens_needed": needed and needed * price["tokens"] // price["windows"]})
    within = all(_verdict(price, share) == "within" for price in prices)
    return {"layers": len(order), "layer": order[-1], "within": within, "prices": prices}


def _verdict(price: Mapping[str, Any], share: float) -> str:
    if price["increase"] is None:
        return "beyond"
    low, high = price["increase_interval"] or (-math.inf, math.inf)
    return "within" if high <= share else "beyond" if low > share else "undecided"


def _failure(step: Mapping[str, Any], share: float) -> str:
    """Why a step fails: the worst text beyond the share, or the worst text with an undecided result."""
    verdicts = [(_verdict(price, share), price) for price in step["prices"]]
    beyond = [price for verdict, price in verdicts if verdict == "beyond"]
    chosen = beyond or [price for verdict, price in verdicts if verdict == "undecided"]
    worst = max(chosen, key=lambda price: math.inf if price["increase"] is None else price["increase"])
    said = f"{_spoken(worst)} on {worst['text']}"
    if beyond:
        return said
    needed = worst["tokens_needed"]
    more = f", about {_rounded(needed)} would be needed" if needed else ""
    return f"{said}, which {worst['tokens']:,} tokens cannot tell from {_percent(share)}{more}"


def _rounded(count: int) -> str:
    """A count with two digits, because it comes from an estimated spread."""
    return f"{float(f'{count:.1e}'):,.0f}"


def _spoken(price: Mapping[str, Any]) -> str:
    if price["increase"] is None:
        return "infinitely much"
    return spoken_interval(price["increase"], price["increase_interval"], percent=True, sign=True)


def _fast_enough(job: Job, selection: Any, goal: TargetSpeedup) -> tuple[int, dict[str, Any]]:
    model, layers = cost_of(job), job.spec.num_layers
    least = min((selection.map_of(i).work() for i in range(layers)), key=lambda work: work.elements)
    reached = getattr(model.speedup_of_sizes(dict.fromkeys(range(1, layers), least)), goal.phase)
    for count in range(1, layers if reached >= goal.factor else 1):  # an unreachable goal needs no order
        found = model.speedup({i: selection.map_of(i) for i in selection.order(count)})
        reached = getattr(found, goal.phase)
        if reached >= goal.factor:
            job.ui.say(f"  {count} layers: modelled x{found.prefill:.2f} in prefill, x{found.decode:.2f} in decode")
            speed = {"prefill": found.prefill, "decode": found.decode}
            return count, {"target_speedup": job.options.target_speedup, "modelled": speed}
    raise NblError(
        f"--target-speedup {job.options.target_speedup} cannot be met: with {layers - 1} of {layers} attention layers "
        f"replaced, {goal.phase} is modelled at x{reached:.2f}; ask for less"
    )


def _small_enough(job: Job, goal: CacheBudget) -> tuple[int, dict[str, Any]]:
    itemsize = job.engine.capabilities.cache_itemsize(job.options.precision)
    count, kept_bytes = layers_for_budget(job.options, goal, job.spec, itemsize)
    of = f"{goal.tokens} tokens" if goal.tokens > 1 else "a token"
    job.ui.say(f"  {count} layers: the caches of {of} take {kept_bytes:,} bytes")
    return count, {"kv_budget": job.options.kv_budget, "cache_bytes": kept_bytes}


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
