"""How many layers a goal takes, along the order in which they go; or how far it got, where it cannot be met.

    max-perplexity-increase   m = 1, 2, ... while held-back perplexity stays within it: every shorter plan is, too
    target-speedup            the first m whose modelled speed-up reaches it
    kv-budget                 the first m whose caches fit; needs no order

Perplexity is taken with the maps of the plan, before any distillation, on the held-back part of the text
that the layers are chosen by; what the plan costs on the texts of the price is said beside it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from nbl_export import cost
from nbl_export.errors import NblError
from nbl_export.goals import CacheBudget, PerplexityIncrease, TargetSpeedup, goal_of
from nbl_export.job import Job

__all__ = ["cost_model", "count_for_goal"]


def count_for_goal(job: Job, selection: Any) -> tuple[int, dict[str, Any]]:
    """How many layers the job's goal takes, and what is to be recorded of it.

    Args:
        selection: the job's `planning.Selection`.

    Raises:
        NblError: the goal cannot be met; the message says how far it got.
    """
    goal = goal_of(job.options)
    if isinstance(goal, PerplexityIncrease):
        return _within_increase(job, selection, goal)
    if isinstance(goal, TargetSpeedup):
        return _fast_enough(job, selection, goal)
    assert isinstance(goal, CacheBudget)
    return _small_enough(job, goal)


def cost_model(job: Job, checkpoint: Path | None = None) -> cost.CostModel:
    """The cost model of what the job ships. checkpoint: a directory with its config.json; None is the job's own."""
    options, capabilities = job.options, job.engine.CAPABILITIES
    size = cost.weight_bytes(options.precision)
    return cost.CostModel(
        job.spec,
        cost.read_intermediate_size(checkpoint or job.checkpoint),
        size,
        2.0 if capabilities.static and options.precision == "int4" else size,  # the static form keeps its head in fp16
        capabilities.cache_itemsize(options.precision),
        options.prompt_length,
        all_logits=options.kept_logits == "all",
        tail_pruned=options.kept_logits == "last",
        token_table=job.has_token_table,
    )


def _within_increase(job: Job, selection: Any, goal: PerplexityIncrease) -> tuple[int, dict[str, Any]]:
    from nbl_export.verification import price_texts

    path: list[dict[str, Any]] = []
    windows = selection.judging_windows
    for count in range(1, job.spec.num_layers):
        order = selection.order(count)
        rise = _rise(selection.switched.price(windows, order))
        path.append({"layers": count, "layer": order[-1], "increase": rise if math.isfinite(rise) else None})
        if not rise <= goal.share:
            break
    within = [step for step in path if step["increase"] is not None and step["increase"] <= goal.share]
    asked = job.options.max_perplexity_increase
    if not within:
        raise NblError(
            f"--max-perplexity-increase {asked} cannot be met: one layer alone ({path[0]['layer']}) raises perplexity "
            f"on held-back text by {_percent(path[0]['increase'])}; allow more, or try --select greedy"
        )
    count, order = len(within), selection.order(len(within))
    others = [(name, _rise(selection.switched.price(windows, order))) for name, windows in price_texts(job)]
    job.ui.say(f"  {count} layers raise held-back perplexity by {_percent(within[-1]['increase'])}, {asked} is allowed")
    for name, rise in others:
        job.ui.say(f"  {_percent(rise)} on {name}")
    rows = [{"text": name, "increase": rise if math.isfinite(rise) else None} for name, rise in others]
    return count, {"max_perplexity_increase": asked, "path": path, "others": rows}


def _rise(loss: Any) -> float:
    before, after = loss.perplexities
    return float(after / before - 1)


def _fast_enough(job: Job, selection: Any, goal: TargetSpeedup) -> tuple[int, dict[str, Any]]:
    model, layers = cost_model(job), job.spec.num_layers
    least = min(sum(m.size for m in selection.map_of(i).matrices.values()) for i in range(layers))
    reached = getattr(model.speedup_of_sizes(dict.fromkeys(range(1, layers), least)), goal.phase)
    for count in range(1, layers if reached >= goal.factor else 1):  # what cannot be met needs no order
        found = model.speedup({i: selection.map_of(i) for i in selection.order(count)})
        reached = getattr(found, goal.phase)
        if reached >= goal.factor:
            job.ui.say(f"  {count} layers: modelled x{found.prefill:.2f} in prefill, x{found.decode:.2f} in decode")
            speed = {"prefill": found.prefill, "decode": found.decode}
            return count, {"target_speedup": job.options.target_speedup, "modelled": speed}
    raise NblError(
        f"--target-speedup {job.options.target_speedup} cannot be met: with {layers - 1} of {layers} attention layers "
        f"replaced {goal.phase} is modelled at x{reached:.2f}; ask for less"
    )


def _small_enough(job: Job, goal: CacheBudget) -> tuple[int, dict[str, Any]]:
    spec, itemsize = job.spec, job.engine.CAPABILITIES.cache_itemsize(job.options.precision)
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


def _percent(share: float | None) -> str:
    return "infinitely much" if share is None or not math.isfinite(share) else f"{100 * share:.1f}%"
