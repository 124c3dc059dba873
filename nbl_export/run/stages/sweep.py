"""The sweep stage: quality against speed for every number of layers, and the recommended point.

    order of layers (`--select`) ─► first 0, 1, ... m layers ─► KL, perplexity on each text    (torch, deciding windows)
                                                             └► speed-up                       (`measure.cost`)

The sweep covers fitted maps, attention dropped in the same order, and the run's distilled maps if there are any.

Maps are distilled together for m layers. For slightly fewer layers, these maps are nearly as good as maps distilled
for these layers alone (10 of 12); for far fewer layers, half as good (4 of 12; docs/experiments.md). So one
distillation gives a curve up to m that is too low at its lower end.

The windows (`held_back`) neither order the layers nor judge the training. Final figures use other windows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.files import write_json
from nbl_export.options.goals import DEFAULT_INCREASE, default_select, saving_inputs
from nbl_export.report.console import METHOD_NAMES
from nbl_export.run.job import Job
from nbl_export.run_directory import MAPS_FILE, SWEEP_FILE
from nbl_export.text.held_back import DIVISION
from nbl_export.verify.perplexity import mix_price

__all__ = ["RECOMMENDED_INCREASE", "recommend", "run", "sweep_inputs"]

RECOMMENDED_INCREASE = DEFAULT_INCREASE  # largest perplexity increase, on the worse text


def sweep_inputs(job: Job) -> list[Any]:
    """Inputs of a sweep beside its own options and the moments."""
    options = job.options
    distilled = job.run.stages.get("distill", {}).get("key")
    return [
        DIVISION,
        options.select or default_select(options),
        job.sweep and job.sweep.layers,
        distilled,
        options.engine,
        options.provider,
        options.precision,
        options.prompt_length,
        *saving_inputs(options),
        *([] if options.has_bias else [options.maps]),
    ]


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write sweep.json; returns facts for the manifest."""
    value, facts = _measure(job)
    write_json(out / SWEEP_FILE, value)
    return facts


def _measure(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of sweep.json, and facts for the manifest (the order of layers, which takes minutes)."""
    from nbl_export.run.stages.selection import Selection

    count = job.sweep.layers if job.sweep else 0
    fitted, dropped = Selection(job, fit="independent"), Selection(job, fit="drop", rank=None)
    order, texts = fitted.order(count), job.texts("deciding")
    mixes = {m: order[:m] for m in range(count + 1)}
    points: list[dict[str, Any]] = []
    for method, selection in (("nbl", fitted), ("drop", dropped)):
        points += _points(job, method, selection.switched, {i: selection.map_of(i) for i in order}, mixes, texts)
    points += _distilled(job, fitted, count, texts)
    value = {
        "select": fitted.select,
        "tap": job.options.tap,
        "order": list(order),
        "tokens": job.options.prompt_length,
        "texts": [name for name, _ in texts],
        "points": points,
        "recommended": recommend(points),
        "recommended_increase": RECOMMENDED_INCREASE,
    }
    return value, fitted.facts() if job.options.fit != "drop" else {}


def _distilled(job: Job, fitted: Any, count: int, texts: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Points of a distilled run: all of its maps, and the first 1, 2, ... `count` layers if an order chose them."""
    if job.options.fit != "distilled" or "distill" not in job.run.stages:
        return []
    from nbl_export.model.mixes import SwitchedModel
    from nbl_export.plan.maps_file import load_maps

    plan = job.plan
    trained = len(plan.replaced)
    order = () if plan.select == "given" else fitted.order(trained)
    mixes = {m: order[:m] for m in range(1, min(count + 1, trained))} if set(order) == set(plan.replaced) else {}
    maps = load_maps(job.run.path / MAPS_FILE, plan.replaced)
    switched = SwitchedModel(job.model, maps, plan.tap, narrow=job.narrow)
    found = _points(job, "distilled", switched, maps, {**mixes, trained: plan.replaced}, texts)
    return [{**point, "distilled_for": trained} for point in found]


def _points(
    job: Job, method: str, switched: Any, maps: Mapping[int, Any], mixes: Mapping[int, Collection[int]],
    texts: Sequence[tuple[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    import dataclasses

    from nbl_export.run.stages.common import cost_of

    losses = []
    for name, windows in texts:
        with job.ui.task(f"{METHOD_NAMES[method]} on {name}") as progress:
            losses.append(switched.window_losses(windows, mixes, progress))
    model = cost_of(job)
    pruned = dataclasses.replace(model, tail_pruned=True, all_logits=False)
    found = []
    for count, mix in mixes.items():
        speed = model.speedup({i: maps[i] for i in mix})
        prices = [mix_price(name, loss[count]) for (name, _), loss in zip(texts, losses, strict=True)]
        found.append({
            "method": method,
            "layers": count,
            "replaced_layers": sorted(mix),
            "prefill": speed.prefill,
            "prefill_tail_pruned": pruned.speedup({i: maps[i] for i in mix}).prefill,
            "decode": speed.decode,
            "prices": prices,
            "worst_increase": _worst(p["increase"] for p in prices),
            "worst_upper": _worst((p["increase_interval"] or [None, None])[1] for p in prices),
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
