"""Quality against speed for every number of layers: the `sweep` stage, its table and the point it recommends.

    order of layers (`--select`) ─► first 0, 1, ... m of it ─► KL, perplexity on each text    (torch, deciding windows)
                                                            └► speed-up                       (`cost`)

for fitted maps, for attention left out in the same order, and for the distilled maps of the run where it has some.
Maps distilled together for m layers serve a few less nearly as well as maps distilled for these alone (10 of 12), and
far less half as well (4 of 12; bench/README.md): one distillation gives a curve up to m, low at its lower end.

The windows (`held_back`) neither ordered the layers nor judged the training, and final figures are taken on others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from nbl_export.held_back import DIVISION
from nbl_export.job import Job
from nbl_export.price import mix_price
from nbl_export.window_intervals import spoken_interval

__all__ = ["RECOMMENDED_INCREASE", "measure", "recommend", "sweep_inputs", "sweep_table"]

RECOMMENDED_INCREASE = 0.10  # of perplexity, on the text that suffers most
_NAMES = {"nbl": "NBL", "drop": "dropped", "distilled": "distilled"}


def sweep_inputs(job: Job) -> list[Any]:
    """What a sweep depends on beside its own options and the moments."""
    options = job.options
    distilled = job.run.stages.get("distill", {}).get("key")
    return [
        DIVISION,
        job.sweep_to,
        distilled,
        options.engine,
        options.provider,
        options.precision,
        options.prompt_length,
        options.kept_logits,
    ]


def measure(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """The value of sweep.json, and facts for the manifest (an order of layers that took minutes)."""
    from nbl_export.planning import Selection

    count = job.sweep_to or 0
    fitted, dropped = Selection(job, method="nbl"), Selection(job, method="drop", rank=None)
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
    return value, fitted.facts() if job.options.method == "nbl" else {}


def _distilled(job: Job, fitted: Any, count: int, texts: Sequence[tuple[str, Any]]) -> list[dict[str, Any]]:
    """Of a distilled run: its maps, and where an order chose its layers, those of the first 1, 2, ... `count` of it."""
    if job.options.fit != "distilled" or "distill" not in job.run.stages:
        return []
    from nbl_export.plan import load_maps
    from nbl_export.switched import SwitchedModel

    plan = job.plan
    trained = len(plan.replaced)
    order = () if plan.select == "given" else fitted.order(trained)
    mixes = {m: order[:m] for m in range(1, min(count + 1, trained))} if set(order) == set(plan.replaced) else {}
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    switched = SwitchedModel(job.model, maps, plan.tap)
    found = _points(job, "distilled", switched, maps, {**mixes, trained: plan.replaced}, texts)
    return [{**point, "distilled_for": trained} for point in found]


def _points(
    job: Job, method: str, switched: Any, maps: Mapping[int, Any], mixes: Mapping[int, Collection[int]],
    texts: Sequence[tuple[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    import dataclasses

    from nbl_export.reach import cost_model

    losses = []
    for name, windows in texts:
        with job.ui.task(f"{_NAMES[method]} on {name}") as progress:
            losses.append(switched.window_losses(windows, mixes, progress))
    model = cost_model(job)
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
    """The largest; None where one is None."""
    found = list(values)
    known = [v for v in found if v is not None]
    return max(known) if len(known) == len(found) else None


def recommend(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The most layers that are shown to raise perplexity by at most `RECOMMENDED_INCREASE` on every text, if any are.

    Of each method 1, 2, ... layers are tested in this order, by the upper end of the 95% interval on the worse text,
    and the first that fails ends it (as in `reach`); with a second method that is distilled, the chance to recommend
    what is beyond it is at most twice that of one test. Dropped attention is there for comparison and not recommended.
    Of two with as many layers: the lower increase.
    """
    good: list[Mapping[str, Any]] = []
    for method in ("nbl", "distilled"):
        for p in sorted((p for p in points if p["method"] == method and p["layers"]), key=lambda p: p["layers"]):
            if p["worst_upper"] is None or p["worst_upper"] > RECOMMENDED_INCREASE:
                break
            good.append(p)
    best = max(good, key=lambda p: (p["layers"], -p["worst_increase"]), default=None)
    return None if best is None else {"method": best["method"], "layers": best["layers"]}


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """`measure` for people."""
    title = f"Quality against modelled speed, layers in the order {', '.join(map(str, sweep['order']))}"
    table = Table("", "layers", "prefill", "tail-pruned", "decode", title=title)
    for text in sweep["texts"]:
        table.add_column(f"perplexity {text}", justify="right")
        table.add_column("KL", justify="right")
    table.add_column("")
    for p in sweep["points"]:
        advice = sweep["recommended"]
        chosen = advice is not None and (p["method"], p["layers"]) == (advice["method"], advice["layers"])
        speeds = [f"x{p[name]:.2f}" for name in ("prefill", "prefill_tail_pruned", "decode")]
        prices = [cell for price in p["prices"] for cell in _cells(price)]
        table.add_row(_name(p), str(p["layers"]), *speeds, *prices, "recommended" if chosen else "")
    return table


def _name(point: Mapping[str, Any]) -> str:
    together = point.get("distilled_for", point["layers"])
    return _NAMES[point["method"]] + (f" for {together}" if together != point["layers"] else "")


def _cells(price: Mapping[str, Any]) -> tuple[str, str]:
    if price["perplexity"] is None or price["increase"] is None:
        return "not finite", "–"
    rise = spoken_interval(price["increase"], price["increase_interval"], percent=True, sign=True)
    return f"{price['perplexity']:.3g}, {rise}", spoken_interval(price["kl"], price["kl_interval"])
