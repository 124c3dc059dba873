"""The number of layers m that a goal replaces, in the order of replacement.

    max-perplexity-increase   m = 1, 2, ... while the increase is shown to be within the goal
    target-speedup            the first m whose modelled speed-up reaches the goal
    kv-budget                 the first m whose caches fit; needs no order

Perplexity uses the maps of the plan before distillation, on the deciding windows of both texts (`held_back`). These
windows neither order the layers nor give final figures. A count is within the goal if the upper end of its 95%
interval is within the goal on every text.

Counts are tested in ascending order, and the first failure ends the test. A count beyond the goal is taken only if the
first count beyond the goal passed. So the error rate is at most that of one test (Maurer, Hothorn and Lehmacher 1995).
Both texts must pass, which needs no correction either (Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.errors import NblError
from nbl_export.plan.goals import CacheBudget, PerplexityIncrease, TargetSpeedup, goal_of
from nbl_export.run.job import Job
from nbl_export.run.stages.common import cost_of
from nbl_export.text.window_intervals import spoken_interval, windows_needed
from nbl_export.verify.perplexity import mix_price

__all__ = ["count_for_goal"]


def count_for_goal(job: Job, selection: Any) -> tuple[int, dict[str, Any]]:
    """The number of layers that the job's goal replaces, and facts for the manifest.

    Args:
        selection: the job's `plan.Selection`.

    Raises:
        NblError: the goal cannot be met; the message has the nearest result.
    """
    goal = goal_of(job.options)
    if isinstance(goal, PerplexityIncrease):
        return _within_increase(job, selection, goal)
    if isinstance(goal, TargetSpeedup):
        return _fast_enough(job, selection, goal)
    assert isinstance(goal, CacheBudget)
    return _small_enough(job, goal)


def _within_increase(job: Job, selection: Any, goal: PerplexityIncrease) -> tuple[int, dict[str, Any]]:
    texts, path = job.texts("deciding"), []
    for count in range(1, job.spec.num_layers):
        path.append(_step(selection, texts, selection.order(count), goal.share))
        if not path[-1]["within"]:
            break
    asked = job.options.max_perplexity_increase
    reached = [step for step in path if step["within"]]
    if not reached:
        raise NblError(
            f"--max-perplexity-increase {asked} cannot be met: one layer alone ({path[0]['layer']}) raises perplexity "
            f"on held-back text by {_failure(path[0], goal.share)}; allow more, or try --select greedy"
        )
    count = len(reached)
    said = "; ".join(f"{_spoken(price)} on {price['text']}" for price in reached[-1]["prices"])
    job.ui.say(f"  {count} layers raise perplexity by {said}; {asked} is allowed")
    if not path[-1]["within"]:
        job.ui.say(f"  {count + 1} layers (with {path[-1]['layer']}): {_failure(path[-1], goal.share)}")
    return count, {"max_perplexity_increase": asked, "path": path}


def _step(selection: Any, texts: Sequence[tuple[str, Any]], order: Sequence[int], share: float) -> dict[str, Any]:
    """Quality loss of replacing the layers of `order` on each text, and whether it is shown to be within `share`."""
    prices = []
    for name, windows in texts:
        losses = selection.switched.window_losses(windows, {"mix": order})["mix"]
        before, after = ([getattr(v, total) / v.positions for v in losses] for total in ("original_sum", "mix_sum"))
        needed = windows_needed(before, after, share)
        price = mix_price(name, losses)
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
    least = min(sum(m.size for m in selection.map_of(i).matrices.values()) for i in range(layers))
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
    spec, itemsize = job.spec, job.engine.capabilities.cache_itemsize(job.options.precision)
    layer_bytes = spec.cache_bytes_per_token(1, itemsize) * goal.tokens
    kept = min(spec.num_layers, int(goal.size_bytes // layer_bytes))
    of = f"{goal.tokens} tokens" if goal.tokens > 1 else "a token"
    if kept < 1:
        raise NblError(
            f"--kv-budget {job.options.kv_budget} cannot be met: with one attention layer left the caches of {of} take "
            f"{layer_bytes:,} bytes, {goal.size_bytes:,.0f} are allowed; allow more or use a smaller --precision"
        )
    count = spec.num_layers - kept
    job.ui.say(f"  {count} layers: the caches of {of} take {kept * layer_bytes:,} bytes")
    return count, {"kv_budget": job.options.kv_budget, "cache_bytes": kept * layer_bytes}


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
