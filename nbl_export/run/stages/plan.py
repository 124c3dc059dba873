"""The stages plan and distill: what `nbl_export.plan` reads and finds, and maps that are trained further."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import arrays_sha256, file_sha256, key_of, write_json
from nbl_export.methods import METHODS, method_of
from nbl_export.methods.base import Choice, ChoiceInputs, Limit, Say, Task
from nbl_export.model import processes
from nbl_export.options.goals import DEFAULT_STEPS, asked_increase, default_minutes
from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.records.inputs import Lazy
from nbl_export.report.quality import describe_curve
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Skipped, StageContext
from nbl_export.run_directory import DISTILL_FILE, MAPS_FILE, START_FILE, SUMS_FILE
from nbl_export.text.parts import Texts

__all__ = ["PlanInputs", "choice_of", "declare", "run"]

_STATE = 5  # kind of the saved state of a distillation; another kind begins anew


@dataclass(frozen=True)
class PlanInputs:
    """What a plan follows from.

    Attributes:
        fit: the source of the maps. method: its name, None for maps that exist.
        choice: inputs of `choose`, None for maps that exist. choose: gives the plan and the maps.
    """

    fit: str
    method: str | None
    choice: ChoiceInputs | None
    choose: Lazy[Any]


def declare(job: Job) -> PlanInputs:
    """The inputs of the stage: those of a method's choice, or the plan and maps of an NBL checkpoint."""
    options = job.options
    if options.fit == CHECKPOINT_FIT:
        return PlanInputs(options.fit, None, None, Lazy(job.fingerprint, lambda: _stored(job)))
    inputs = choice_of(job)
    known = job.run.manifest

    def choose(task: Task, say: Say) -> Choice:
        return METHODS[options.method].choose(inputs, task, say, known)

    return PlanInputs(options.fit, options.method, inputs, Lazy(None, lambda: choose))


def _stored(job: Job) -> Any:
    from nbl_export.methods.checkpoint import load

    plan, maps = load.load_maps(job.source.value, job.decoder.num_layers)
    return lambda _task, _say: Choice(plan, maps, {})


def choice_of(job: Job) -> ChoiceInputs:
    """What a method's choice follows from."""
    from nbl_export.methods.sums_file import open_sums

    options = job.options
    setting = {"engine": options.engine, "precision": options.precision, "tokens": options.prompt_length}
    return ChoiceInputs(
        num_layers=job.decoder.num_layers,
        candidates=job.candidates,
        limit=Limit(asked_increase(options), options.max_perplexity_increase),
        trains=Lazy(None, lambda: job.trains),
        sums=Lazy(job.files_of("calibrate"), lambda: open_sums(job.run.path / SUMS_FILE)),
        model=job.model,
        partial=job.partial,
        selection=job.selection,
        validation=job.text.validation,
        selection_items=job.text.retrieval("selection"),
        validation_items=job.text.retrieval("validation"),
        saved=Lazy(options.kept_logits, lambda: job.saved_work),
        speedup=Lazy(None, lambda: job.cost.value.speedup),
        setting=Lazy(None, lambda: setting),
    )


def run(inputs: PlanInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write the maps; returns plan, scores, order and curve for the manifest."""
    from nbl_export.methods.maps_file import save_maps

    chosen: Choice = inputs.choose.value(ctx.ui.task, lambda line: ctx.ui.say(f"  {line}"))
    plan = chosen.plan
    if chosen.facts.get("curve"):
        ctx.ui.say(f"  {describe_curve(chosen.facts['curve'])}")
    distilled = plan.layers and inputs.choice is not None and inputs.choice.trains.value
    if processes.is_rank0():
        save_maps(chosen.maps, out / (START_FILE if distilled else MAPS_FILE), plan.tap)
    return {
        "fit": {"kind": "independent" if inputs.fit == "distilled" else inputs.fit},
        "replaced_layers": list(plan.layers),
        "kinds": list(plan.mixers),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
        "exit": method_of(chosen.maps).summary(chosen.maps),
        "goal": None,
        "curve": None,
        **chosen.facts,
    }


# -- distill ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillInputs:
    """What trained maps follow from, beside the maps at the start.

    Attributes:
        training: windows of the training text. early_stopping: held-out windows that choose the best step.
        selection, validation: texts by which layers are given back; None if all layers stay.
    """

    fingerprint: str
    distill_steps: int | None
    distill_minutes: float | None
    seed: int
    lora_rank: int
    label_weight: float
    training: Lazy[Any]
    early_stopping: Lazy[Any]
    selection: Lazy[Texts] | None
    validation: Lazy[Texts] | None
    model: Lazy[Any]
    bf16_matmul: Lazy[bool]


def declare_distill(job: Job) -> DistillInputs | Skipped:
    """The inputs of the stage; left out unless maps are distilled."""
    if job.options.fit != "distilled" or not job.plan.layers:
        return Skipped()
    if not job.trains:
        return Skipped("the model does not fit into memory, which training needs")
    options = job.options
    drops_layers = "order" in (job.run.manifest.get("goal") or {})
    return DistillInputs(
        fingerprint=job.fingerprint,
        distill_steps=options.distill_steps,
        distill_minutes=options.distill_minutes,
        seed=options.seed,
        lora_rank=options.lora_rank,
        label_weight=options.label_weight,
        training=job.text.training,
        early_stopping=job.text.early_stopping,
        selection=job.selection if drops_layers else None,
        validation=job.text.validation if drops_layers else None,
        model=job.model,
        bf16_matmul=job.bf16_matmul,
    )


def run_distill(inputs: DistillInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write the trained maps and distill.json; returns the facts for the manifest."""
    from nbl_export.methods.distill import training
    from nbl_export.methods.distill.state import State
    from nbl_export.methods.maps_file import load_maps, maps_in, save_maps

    plan = ctx.plan
    windows = inputs.training.value
    early_stopping = inputs.early_stopping.value
    goal = _Goal(inputs, ctx) if inputs.validation else None
    settings = _settings(inputs, goal)
    path = ctx.run.path / START_FILE
    start = load_maps(path, maps_in(path)[0], ctx.run.decoder.hidden_size)
    state = State(ctx.run.partial("distill"), _state_key(inputs.fingerprint, path, windows, early_stopping, settings))
    with ctx.ui.task("distilling") as progress:
        found = training.distill(
            inputs.model.value,
            start,
            plan.tap,
            windows,
            early_stopping,
            settings,
            training.Callbacks(progress, lambda s: ctx.ui.say(f"  {s}"), state, goal.drop_layers if goal else None),
        )
    facts = goal.reach(found.maps) if goal else {}
    replaced = facts.get("replaced_layers", plan.layers)
    if processes.is_rank0():
        save_maps({i: found.maps[i] for i in replaced}, out / MAPS_FILE, plan.tap)
        write_json(out / DISTILL_FILE, {"held_kl": found.held_kl, "train_kl": found.train_kl, "seconds": found.seconds})
    how = {"kind": "distilled", "label_weight": settings.label_weight, "steps": len(found.train_kl)}
    return {"fit": how, **facts}


def _settings(inputs: DistillInputs, goal: _Goal | None) -> Any:
    from nbl_export.methods.distill import training

    steps = inputs.distill_steps
    minutes = inputs.distill_minutes
    if goal and not steps and not minutes:
        minutes = default_minutes(inputs.model.value.num_parameters())
    return training.DistillSettings(
        steps or (training.UNLIMITED if minutes else DEFAULT_STEPS),
        minutes,
        seed=inputs.seed,
        dtype="auto",
        lora_rank=inputs.lora_rank,
        label_weight=inputs.label_weight,
        drops_layers=goal is not None,
    )


class _Goal:
    """A limit on quality that trained maps are to keep, by the plan's order of replacement."""

    def __init__(self, inputs: DistillInputs, ctx: StageContext) -> None:
        self._inputs = inputs
        self._ctx = ctx
        self._goal = ctx.run.manifest["goal"]
        self._order: tuple[int, ...] = tuple(self._goal["order"])

    def drop_layers(self, maps: dict[int, Any]) -> tuple[int, ...]:
        """The layers that stay while training goes on."""
        from nbl_export.methods.choose import count_estimated

        assert self._inputs.selection is not None
        begun = len(self._order)
        texts = self._inputs.selection.value
        count = count_estimated(self._with(maps), self._order, self._goal["share"], texts, self._ctx.ui.task)
        self._order = self._order[:count]
        self._ctx.ui.say(f"  {count} of {begun} layers stay; the training goes on with these")
        return self._order

    def reach(self, maps: dict[int, Any]) -> dict[str, Any]:
        """The facts of the layers whose trained maps keep the limit."""
        from nbl_export.methods.choose import count_trained

        assert self._inputs.validation is not None
        order = [i for i in self._order if i in maps]
        goal = self._goal
        limit = Limit(goal["share"], None if goal["default"] else goal["max_perplexity_increase"])
        texts = self._inputs.validation.value
        count, found, lines = count_trained(self._with(maps), order, limit, texts, self._ctx.ui.task)
        for line in lines:
            self._ctx.ui.say(f"  {line}")
        replaced = sorted(order[:count])
        return {"replaced_layers": replaced, "kinds": [maps[i].kind for i in replaced], "goal": {**goal, **found}}

    def _with(self, maps: dict[int, Any]) -> Any:
        from nbl_export.methods.losses import PartialReplacement

        inputs = self._inputs
        return PartialReplacement(inputs.model.value, maps, self._ctx.plan.tap, bf16_matmul=inputs.bf16_matmul.value)


def _state_key(fingerprint: str, maps: Path, windows: Any, early_stopping: Any, settings: Any) -> str:
    """Fingerprint of an unfinished distillation: model, maps at the start, token ids and settings."""
    ids = arrays_sha256({"windows": windows.numpy(), "early_stopping": early_stopping.numpy()})
    return key_of(_STATE, fingerprint, ids, file_sha256(maps), dataclasses.asdict(settings))
