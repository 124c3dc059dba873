"""Converts a finished run to a form that other engines read, and lists where the run can be served.

nbl-export convert DIR --to FORM --output NEW      nbl-export convert DIR

transformers   directory of `nbl_export.hf`'s classes, which vLLM's plugin reads too
nemotron-nas   directory for TensorRT-LLM, and for the converter of llama.cpp
mlx            directory for mlx-lm
edge-llm       directory for TensorRT-Edge-LLM
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, ParityError, UsageError
from nbl_export.files import make_folder, move_into_place, refuse_occupied, scratch_in
from nbl_export.methods import METHODS
from nbl_export.methods.base import Maps, Mixer
from nbl_export.methods.maps_file import load_maps
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.publish.checkpoint_check import CHECK_FILE, expect, save, verify_checkpoint
from nbl_export.records.destinations import DESTINATIONS, describe_kind, destination_named
from nbl_export.records.plan import USUAL_KIND
from nbl_export.report.words import size
from nbl_export.run.job import Job
from nbl_export.run.progress import Ui
from nbl_export.run.settled import of_run, why_unfit
from nbl_export.run_directory import CHECKPOINT, DECODERS, MAPS_FILE, RunDirectory
from nbl_export.targets import load_engine

__all__ = ["FORMS", "Route", "convert", "open_finished", "routes"]

_INSTEAD = (
    "use --to transformers or vllm, convert a run of linear layers (--layers N), or deploy DIR/model with ONNX Runtime "
    "GenAI"
)
_OF_LLAMA_CPP = ("gguf", "ollama")
_BARE_TAP = "normed"  # of forms that hold one matrix a layer


def convert(output: Path, form: str, target: Path, ui: Ui, *, force: bool = False) -> None:
    """Write a run's model in a form at `target`, completely or not at all.

    Args:
        form: one of FORMS, or an engine that reads one.
        force: go on although verification failed.

    Raises:
        UsageError: no such form.
        NblError: `target` is there already, the run is not finished or failed, or its model has no such form.
        ParityError: what was written is not the model.
    """
    name = _destination_of(form)
    refuse_occupied(target)
    with open_finished(output, ui, force=force) as job, _scratch_for(job, target) as scratch:
        maps = load_maps(job.run.path / MAPS_FILE, job.plan.layers, job.decoder.hidden_size)
        _refuse_unread(job, maps, form, name)
        with ui.task("saving"):
            form = DESTINATIONS[name].form
            said = FORMS[form](job, maps, form, scratch / "saved")
            move_into_place(scratch / "saved", target)
    for sentence in said:
        ui.say(f"  {sentence}")
    place = shlex.quote(str(target))
    ui.say(f"  size    {size(sum(file.stat().st_size for file in target.rglob('*') if file.is_file()))}")
    if (target / CHECK_FILE).is_file():
        ui.say(f"  check   nbl-export verify {place}")
    if command := DESTINATIONS[name].command:
        ui.say(f"  next    {command.format(place)}")


@contextlib.contextmanager
def _scratch_for(job: Job, target: Path) -> Iterator[Path]:
    """A place for unfinished files: in the run, or beside `target` if the run is only readable."""
    if job.run.is_writable:
        with job.run.scratch() as scratch:
            yield scratch
        return
    make_folder(target.parent)
    with scratch_in(target.parent) as scratch:
        job.converted = scratch / CHECKPOINT
        yield scratch


@contextlib.contextmanager
def open_finished(output: Path, ui: Ui, *, force: bool = False) -> Iterator[Job]:
    """The verified run in `output`, whose torch model is on the CPU. A run that is writable is locked in the context.

    Args:
        force: go on although verification failed.

    Raises:
        NblError: the run is not finished or failed, or its model is not available.
        CorruptError: the maps have changed since they were fitted.
    """
    with RunDirectory(output).read() as run:
        run.require("verify")
        run.refuse_failed(force=force)
        for stage in ("plan", "distill"):
            if stage in run.stages:
                run.check(stage)
        job = of_run(run, run.options, ui)
        job.options = dataclasses.replace(job.options, device="cpu")  # forms are compared bit for bit
        yield job


def _destination_of(asked: str) -> str:
    """The destination that is asked for by its name, or by the form that it reads."""
    if asked.lower() in _OF_LLAMA_CPP:
        raise UsageError(
            f"--to {asked} is llama.cpp's own: its convert_hf_to_gguf.py makes a GGUF file of "
            "convert --to nemotron-nas (docs/serving.md)"
        )
    with contextlib.suppress(UsageError):
        name = destination_named(asked)
        if DESTINATIONS[name].form:
            return name
        raise NblError(f"--to {asked} writes nothing: it takes the folder of a run that was made with --for {name}")
    reading = (name for name, place in DESTINATIONS.items() if place.form and name not in FORMS)
    raise UsageError(f"--to is {', '.join(FORMS)}, or a destination ({', '.join(reading)}), not {asked!r}")


def _refuse_unread(job: Job, maps: Maps, asked: str, name: str) -> None:
    """Refuse layers and models that the destination does not read.

    Raises:
        NblError: the message has the reason.
    """
    run = job.run.path
    place = DESTINATIONS[name]
    kinds = {mixer.kind for mixer in maps.values()}
    if place.refuses(kinds, frozenset(), "", ()):
        kind = describe_kind(min(kinds))
        raise NblError(f"{run} has {kind}, which --to {asked} does not hold; {_INSTEAD}")
    if reason := place.refuses(kinds, frozenset(), job.decoder.architecture, maps):
        raise NblError(f"--to {asked} cannot have {run}: {reason}; nbl-export convert DIR lists who can")
    weights = [mixer.product() for mixer in maps.values()]
    if place.bare and any(weight is None or (job.plan.tap != _BARE_TAP and weight.any()) for weight in weights):
        raise NblError(
            f"{run} has maps with a bias or on the residual stream, and --to {asked} holds one matrix a layer on the "
            f"normed input; make another run with --for {name}"
        )
    checkpoint = job.checkpoint.value
    if reason := why_unfit(name, config_of(checkpoint), checkpoint, tuple(maps)):
        raise NblError(reason)


def _write_checkpoint(job: Job, maps: Maps, _form: str, out: Path) -> list[str]:
    """The model with the stored weights of the original, and maps in float32. The classes in `hf` load it.

    Raises:
        NblError: the model is not available, its architecture has no class, or what was written cannot be loaded.
        ParityError: what was written computes something else.
    """
    from nbl_export.methods.applied import applied
    from nbl_export.methods.checkpoint.copied import copy_linearized
    from nbl_export.methods.checkpoint.hf_classes import save_linearized
    from nbl_export.model.checkpoint.pretrained import check_weights

    checkpoint = job.checkpoint.value
    tap = job.plan.tap
    if not copy_linearized(checkpoint, maps, tap, out):
        save_linearized(copy.deepcopy(job.model.value), checkpoint, maps, tap, out)
    check_weights(out)
    if job.shortage.value:
        return [f"not compared with the run's model: the weights are {job.shortage.value}"]
    with applied(job.model.value, maps, tap):
        expected = expect(job.model.value, job.text.own_test.value[0].tolist())
    job.model.forget()
    save(expected, out)
    found = verify_checkpoint(out)
    if not found.passed:
        raise ParityError(f"the checkpoint of {job.run.path} is not its model: {found.metric} {found.value}")
    return [f"{found.metric} {found.value:.2g}, tolerance {found.tolerance:g}: {found.detail}"]


def _write_nemotron_nas(job: Job, maps: Maps, form: str, out: Path) -> list[str]:
    """A directory whose model computes what the run's does.

    Raises:
        NblError: the form does not hold the model.
        ParityError: the model that was read back computes something else.
    """
    from nbl_export.methods.applied import linearize
    from nbl_export.model.head import log_probabilities
    from nbl_export.targets.checkpoint import nemotron_nas

    model = job.model.value
    ids = _ids(job)
    alone = {i: _matrix_alone(mixer) for i, mixer in maps.items()}
    nemotron_nas.save(copy.deepcopy(model), job.checkpoint.value, alone, form, out)
    expected = log_probabilities(linearize(copy.deepcopy(model), alone, _BARE_TAP), ids)
    return [_compared(job, nemotron_nas.load(out), expected, ids)]


def _matrix_alone(mixer: Mixer) -> Mixer:
    """The linear layer with the matrix of a mixer that is one product; dropped attention has zeros."""
    weight = mixer.product()
    assert weight is not None
    return METHODS[USUAL_KIND].from_tensors({"weight": weight, "bias": np.zeros(len(weight), np.float32)})


def _write_edge_llm(job: Job, maps: Maps, _form: str, out: Path) -> list[str]:
    """A directory in float16 whose model computes what the run's does.

    Raises:
        NblError: the form does not hold the model.
        ParityError: the model that was read back computes something else.
    """
    from nbl_export.model.head import log_probabilities
    from nbl_export.targets.checkpoint import edge_llm

    model = copy.deepcopy(job.model.value)
    ids = _ids(job)
    edge_llm.save(model, job.checkpoint.value, maps, job.plan.tap, out)
    same = _compared(job, edge_llm.load(out), log_probabilities(model, ids), ids)
    return [same, *edge_llm.remarks(out)]


def _ids(job: Job) -> list[int]:
    """The beginning of text that neither fitted nor chose anything."""
    ids: list[int] = job.text.own_test.value[0, :64].tolist()
    return ids


def _compared(job: Job, written: Any, expected: Any, ids: Sequence[int]) -> str:
    """Log-probabilities of a model that was read back beside those of the run's model, in words.

    Raises:
        ParityError: they differ.
    """
    from nbl_export.model.head import log_probabilities

    away = float(abs(log_probabilities(written, ids) - expected).max())
    if away != 0.0:
        raise ParityError(
            f"the checkpoint of {job.run.path} is not its model: logarithms of probabilities differ by {away:.2g}"
        )
    return "largest difference of a log-probability: 0"


# What writes each form: it returns what the user is told.
FORMS: dict[str, Callable[[Job, Maps, str, Path], list[str]]] = {
    "transformers": _write_checkpoint,
    "nemotron-nas": _write_nemotron_nas,
    "mlx": _write_nemotron_nas,
    "edge-llm": _write_edge_llm,
}


# -- where a run can be served -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """A destination of a run: what to serve there, or why it cannot have the model."""

    name: str
    title: str
    take: str
    reason: str


def routes(directory: Path) -> list[Route]:
    """Every destination of a run, in the order of the table.

    Raises:
        NblError: the directory is no run, or its layers are not chosen yet.
    """
    run = RunDirectory.existing(directory)
    run.require("plan")
    with contextlib.suppress(Exception):  # a machine without torch, or a folder that is not whole: the table decides
        from nbl_export.model.checkpoint.pretrained import config_of

        original = directory / DECODERS["original"]
        return [_route(name, run, config_of(original)) for name in DESTINATIONS]
    return [_route(name, run, None) for name in DESTINATIONS]


def _route(name: str, run: RunDirectory, config: Any) -> Route:
    place = DESTINATIONS[name]
    options = run.options
    plan = run.plan
    directory = run.path
    if not place.form:
        engine = options.engine
        provider = options.provider
        folder = "engine/model" if load_engine(place.engine).capabilities.static else "model"
        same = (engine, provider) == (place.engine, place.provider)
        other = f"the run is for {engine}" + (f" with --provider {provider}" if provider != "cpu" else "")
        reason = "" if same else f"{other}; make another with --for {name}"
        return Route(name, place.title, f"{directory / folder}/", reason)
    architecture = run.decoder.architecture
    bare = options.fit in ("drop", CHECKPOINT_FIT) or (not options.has_bias and plan.tap == "normed")
    reason = place.refuses(plan.mixers, frozenset(), architecture, plan.layers)
    if reason and not place.refuses((USUAL_KIND,), frozenset(), architecture, ()):
        reason += f"; make another run with --for {name}"
    elif not reason and place.bare and not bare:
        reason = f"it holds one matrix a layer on the normed input; make another run with --for {name}"
    elif not reason and config is not None:
        reason = why_unfit(name, config, directory / DECODERS["original"], plan.layers)
    command = f"nbl-export convert {shlex.quote(str(directory))} --to {name} --output NEW"
    return Route(name, place.title, command, reason)
