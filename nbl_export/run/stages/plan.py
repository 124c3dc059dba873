"""The stages plan, sweep and distill: what `nbl_export.plan` reads and finds, and maps that are trained further."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import arrays_sha256, file_sha256, key_of, write_json
from nbl_export.measure.cost import map_sizes
from nbl_export.options.goals import (
    DEFAULT_INCREASE,
    CacheBudget,
    PerplexityIncrease,
    TargetSpeedup,
    default_select,
    goal_of,
    layers_for_budget,
    parse_layers,
    read_rank,
)
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL
from nbl_export.plan.inputs import (
    AskedGoal,
    AskedWindows,
    DistilledMaps,
    MapKind,
    Maps,
    OrderInputs,
    PlanInputs,
    SweepInputs,
)
from nbl_export.records.inputs import Lazy
from nbl_export.report.console import METHOD_NAMES
from nbl_export.report.quality import spoken_curve
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import DISTILL_FILE, MAPS_FILE, MOMENTS_FILE, START_FILE, SWEEP_FILE
from nbl_export.text.windows import Division

__all__ = ["declare", "declare_sweep", "order_of", "run", "run_sweep"]

_STATE = 4  # kind of the saved state of a distillation; another kind begins anew


def declare(r: Resolver) -> PlanInputs | Lazy[Any]:
    """The inputs of the stage plan, or the plan and maps of an NBL checkpoint."""
    from nbl_export.model.checkpoint import load

    options = r.options
    if options.fit == CHECKPOINT_FIT:
        return Lazy([CHECKPOINT_FIT, r.fingerprint], lambda: load.load_maps(r.source, r.spec.num_layers))
    goal = _goal(r)
    return r.fill(
        PlanInputs,
        order=order_of(r),
        request=_request(r),
        windows=_windows(r),
        goal=goal,
        quarter=Lazy(None, lambda: r.is_graph or bool(r.shortage.value)),
        # The curve states what its speed-ups are modelled for, so that only a goal needs them in the key.
        speedup=Lazy(r.cost.identity if isinstance(goal.goal, TargetSpeedup) else None, lambda: r.cost.value.speedup),
    )


def _request(r: Resolver) -> int | tuple[int, ...] | None:
    """How many or which layers get maps: none beside windows, if no layers are named."""
    layers = r.options.layers
    if layers is None:
        return None if r.options.window_layers is None else ()
    return parse_layers(layers, r.spec.num_layers)


def _windows(r: Resolver) -> AskedWindows | None:
    if r.options.window_layers is None:
        return None
    layers = parse_layers(r.options.window_layers, r.spec.num_layers, "--window-layers")
    assert isinstance(layers, tuple)  # a count is refused when options are settled
    return AskedWindows(layers, r.options.window)


def order_of(r: Resolver) -> OrderInputs:
    """What the order of replacement follows from."""
    options, spec = r.options, r.spec
    usual = options.select or default_select(options)
    return OrderInputs(
        MapKind(options.kind, options.tap, read_rank(options.rank), options.has_bias),
        spec.num_layers,
        spec.hidden_size,
        Lazy(usual, lambda: _select(r)),
        Lazy(r.key("calibrate"), lambda: _moments(r)),
        r.model,
        r.narrow,
        r.choosing,
        Lazy(None, lambda: None if options.says_itself else r.second_text.sha256),
        Lazy(r.saving if usual == "efficient" else None, lambda: _saved(r)),
    )


def _select(r: Resolver) -> str:
    """The selection method: that of the options, or the best method that memory allows.

    A limit on quality asks for the layers that cost least, a count for the best quality at the speed that it gives.
    """
    if r.options.select is not None:
        return r.options.select
    if r.is_graph:  # greedy needs the torch model
        return "cca"
    if r.shortage.value:
        r.ui.say("  choosing layers by CCA bounds: --select greedy and efficient need the model in memory")
        return "cca"
    return default_select(r.options)


def _moments(r: Resolver) -> Callable[[int, str], Any]:
    from nbl_export.calibrate.moments_file import whole_moments

    def moments_of(layer: int, tap: str) -> Any:
        with whole_moments(r.run.path / MOMENTS_FILE) as file:
            return file.sums(layer, tap).moments()

    return moments_of


def _saved(r: Resolver) -> Callable[[Maps, int], float]:
    costs = r.cost.value
    return lambda maps, tokens: dataclasses.replace(costs, tokens=tokens).prefill_saved(map_sizes(maps))


def _goal(r: Resolver) -> AskedGoal:
    """The goal of the options: a limit on quality if there is none."""
    options = r.options
    goal = goal_of(options) or PerplexityIncrease(DEFAULT_INCREASE)
    if isinstance(goal, CacheBudget):
        itemsize = r.engine.capabilities.cache_itemsize(options.precision)
        return AskedGoal(goal, options.kv_budget, layers_for_budget(options, goal, r.spec, itemsize))
    return AskedGoal(goal, options.max_perplexity_increase or options.target_speedup)


def run(inputs: PlanInputs | Lazy[Any], place: Place, out: Path) -> dict[str, Any]:
    """Write the maps; returns plan, scores, order and curve for the manifest."""
    from nbl_export.plan.maps_file import save_maps

    facts: dict[str, Any] = {"ranks": {}, "goal": None, "curve": None}
    if isinstance(inputs, Lazy):
        (plan, maps), fit = inputs.value, CHECKPOINT_FIT
    else:
        from nbl_export.plan.order import Selection
        from nbl_export.plan.planning import make_plan, with_windows

        fit, selection = inputs.fit, Selection(inputs.order, place.ui.task, place.run.manifest.get("greedy"))
        plan, maps, facts = make_plan(inputs, selection, lambda line: place.ui.say(f"  {line}"), place.ui.task)
        if inputs.windows is not None:
            if inputs.quarter.value:
                raise NblError("--window-layers needs the torch model, which does not fit into memory; leave it out")
            plan, maps = with_windows(plan, maps, inputs.windows, inputs.order.model.value)
        if facts["curve"]:
            place.ui.say(f"  {spoken_curve(facts['curve'])}")
    distilled = fit == "distilled" and plan.replaced
    save_maps(maps, out / (START_FILE if distilled else MAPS_FILE), plan.tap)
    return {
        "fit": {"kind": "independent" if distilled else fit},
        "replaced_layers": list(plan.replaced),
        "kinds": list(plan.kinds),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
        **facts,
    }


# -- sweep -----------------------------------------------------------------------------------------------------


def declare_sweep(r: Resolver) -> SweepInputs | LeftOut:
    """The inputs of the stage sweep; left out unless a sweep was asked for."""
    options = r.options
    if r.sweep is None:
        return LeftOut()
    if options.fit == CHECKPOINT_FIT:
        return LeftOut(NO_ORIGINAL)
    order = order_of(r)
    distilled, trained = None, r.run.stages.get("distill", {}).get("key")
    if options.fit == "distilled" and trained:
        maps: Lazy[Maps] = Lazy(trained, lambda: Place(r.run, r.ui).maps())
        distilled = DistilledMaps(r.plan.replaced, r.plan.select, maps)

    def pruned() -> Callable[[Maps], Any]:
        return dataclasses.replace(r.cost.value, tail_pruned=True, all_logits=False).speedup

    return r.fill(
        SweepInputs,
        order=dataclasses.replace(order, kind=dataclasses.replace(order.kind, kind="linear")),
        own=options.fit != "drop",
        count=r.sweep.layers,
        tokens=options.prompt_length,
        distilled=distilled,
        speedup=Lazy(r.cost.identity, lambda: r.cost.value.speedup),
        pruned_speedup=Lazy(r.cost.identity, pruned),
    )


def run_sweep(inputs: SweepInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write sweep.json; returns the order of layers, which takes minutes, for the manifest."""
    from nbl_export.plan.order import Selection
    from nbl_export.plan.planning import sweep

    fitted = Selection(inputs.order, place.ui.task, place.run.manifest.get("greedy"))
    write_json(out / SWEEP_FILE, sweep(inputs, fitted, METHOD_NAMES, place.ui.task))
    return fitted.facts(inputs.speedup, inputs.setting) if inputs.own else {}


# -- distill ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillInputs:
    """What trained maps follow from, beside the maps at the start.

    training: windows of the training text. held_back: their part "choosing" chooses the best step.
    """

    fingerprint: str
    distill_steps: int | None
    distill_minutes: float | None
    seed: int
    lora_rank: int
    label_weight: float
    training: Lazy[Any]
    held_back: Lazy[Division]
    model: Lazy[Any]
    checkpoint: Lazy[Path]


def declare_distill(r: Resolver) -> DistillInputs | LeftOut:
    """The inputs of the stage; left out unless maps are distilled."""
    return r.fill(DistillInputs) if r.options.fit == "distilled" and r.plan.replaced else LeftOut()


def run_distill(inputs: DistillInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write the trained maps and distill.json; returns the facts for the manifest."""
    from nbl_export.distill import training
    from nbl_export.distill.training import State
    from nbl_export.parallel import ranks as distributed
    from nbl_export.plan.maps_file import load_maps, save_maps

    plan, windows, judging = place.plan, inputs.training.value, inputs.held_back.value.choosing
    minutes = inputs.distill_minutes
    steps = inputs.distill_steps or (training.UNLIMITED if minutes else training.DEFAULT_STEPS)
    settings = training.DistillSettings(
        steps, minutes, seed=inputs.seed, dtype="auto", lora_rank=inputs.lora_rank,
        label_weight=inputs.label_weight,
    )  # fmt: skip
    path = place.run.path / START_FILE
    start = load_maps(path, plan.replaced)
    ranks = distributed.current()
    maps = {i: [m.kind, m.tensors()] for i, m in start.items()}
    given = {"maps": maps, "windows": windows, "held": judging, "settings": settings, "tap": plan.tap}
    ranks.lead({"work": "distill", "checkpoint": str(inputs.checkpoint.value.absolute()), **given})
    ranks.agree(None)
    state = State(place.run.partial("distill"), _state_key(inputs.fingerprint, path, windows, judging, settings))
    with place.ui.task("distilling") as progress:
        found = training.distill(
            ranks.place(inputs.model.value), start, plan.tap, training.TrainingText(windows, judging), settings,
            training.Callbacks(progress, lambda s: place.ui.say(f"  {s}"), state, ranks),
        )  # fmt: skip
    ranks.done()
    save_maps(found.maps, out / MAPS_FILE, plan.tap)
    write_json(out / DISTILL_FILE, {"held_kl": found.held_kl, "train_kl": found.train_kl, "seconds": found.seconds})
    best = min(found.held_kl, key=lambda row: row[1])
    kl = {"held_kl_start": found.held_kl[0][1], "held_kl_best": best[1]}
    how = {"kind": "distilled", "label_weight": settings.label_weight}
    return {"fit": {**how, "steps": len(found.train_kl), "best_step": best[0], **kl}}


def _state_key(fingerprint: str, maps: Path, windows: Any, judging: Any, settings: Any) -> str:
    """Fingerprint of an unfinished distillation: model, maps at the start, token ids and settings."""
    ids = arrays_sha256({"windows": windows.numpy(), "judging": judging.numpy()})
    return key_of(_STATE, fingerprint, ids, file_sha256(maps), dataclasses.asdict(settings))
