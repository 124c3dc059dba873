"""What is asked for becomes a settled job: options, a decoder, and what identifies its model and its text.

asked + files of the model ─► settle_job ─► Job     a whole job
changes + nbl.json ─────────► settle_run ─► Job     further stages of a run; its model need not be here

Both read the facts of the engine (`Capabilities`) and of the model (`ModelFacts`). What the facts mean for an option is
said by `options.rules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import read_json
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.checkpoint.source import Source, resolve
from nbl_export.model.architectures import ARCHITECTURES, exits_refused, supported_near
from nbl_export.model.memory import holds
from nbl_export.options.option import ModelFacts
from nbl_export.options.options import CHECKPOINT_FIT, JobOptions
from nbl_export.options.public import located
from nbl_export.options.settle import settle
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job, require_engine
from nbl_export.run.progress import Ui
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import ENGINES, load_engine
from nbl_export.targets.base import Engine
from nbl_export.text.mixture import absolute_sources, identify

__all__ = ["capabilities_of", "faster_engine", "model_facts", "of_run", "settle_job", "settle_run", "why_unfit"]


def settle_job(
    asked: Mapping[str, Any], recorded: JobOptions | None, run: RunDirectory, ui: Ui, *, runs_engine: bool = True
) -> Job:
    """A whole job, in a directory that holds nothing yet or a run that goes on.

    Options, engine and processor are checked before the model is looked for, which can fetch many gigabytes.

    Args:
        recorded: the options of another run, which those asked for change.
        runs_engine: whether the job needs its engine on this machine.

    Raises:
        NblError: the model cannot be used, an option does not fit it, or this machine lacks what is asked for.
    """
    options = settle(asked, capabilities_of, recorded=recorded)
    if options.device != "auto" or options.compute_dtype == "bfloat16":
        from nbl_export.model import bfloat16, device

        bfloat16.use_bf16(options.compute_dtype, device.choose_device(options.device, 0))
    if runs_engine:
        require_engine(options)
    source = resolve(options.model)
    if run.manifest and run.manifest["model"]["fingerprint"] == source.fingerprint:
        decoder = run.decoder
    else:
        from nbl_export.methods.checkpoint import load

        decoder = load.read_spec(source)  # by transformers, which takes seconds
    options = settle(asked, capabilities_of, _facts_of(source, decoder), recorded)
    _refuse_unfit(options, source)
    sources = identify(options.calibration)
    codes, noted = _codes(options, decoder)
    facts = {
        "model": {
            "name": options.model,
            "title": source.title,
            "revision": source.revision,
            "architecture": decoder.architecture,
            "fingerprint": source.fingerprint,
        },
        "decoder": dataclasses.asdict(decoder),
        "places": {"model": source.place, "calibration": absolute_sources(options.calibration)},
        "num_layers": decoder.num_layers,
        "sources": sources,
        "options": options.to_json(),
        **noted,
    }
    return Job(
        run=run,
        ui=ui,
        options=options,
        decoder=decoder,
        fingerprint=source.fingerprint,
        source=Lazy(source.fingerprint, lambda: source),
        codes=codes,
        sources=sources,
        facts=facts,
    )


def settle_run(run: RunDirectory, changes: Mapping[str, Any], ui: Ui) -> Job:
    """Further stages of a run, with changed options if any.

    Raises:
        NblError: a changed option does not fit the run, or the changed engine is not available here.
    """
    recorded = run.options
    if "engine" in changes:
        source = capabilities_of(changes["engine"]).source
        if source != capabilities_of(recorded.engine).source:
            same = [name for name in ENGINES if capabilities_of(name).source == source]
            raise NblError(
                f"{run.path} is a run for --engine {recorded.engine}, whose graphs {changes['engine']} does not take; "
                f"make another run with --engine {' or '.join(same)}"
            )
    is_nbl = recorded.fit == CHECKPOINT_FIT
    tap = recorded.tap if is_nbl else ""
    facts = model_facts(run.decoder, tap, run.manifest.get("kinds", ()) if is_nbl else ())
    options = settle(changes, capabilities_of, facts, recorded)
    if "engine" in changes:
        require_engine(options)
    return of_run(run, options, ui)


def of_run(run: RunDirectory, options: JobOptions, ui: Ui) -> Job:
    """A run with settled options. Its text and its model stay those that it was made from."""
    manifest = run.manifest
    here = located(options, manifest)
    decoder = run.decoder
    fingerprint = str(manifest["model"]["fingerprint"])
    facts: dict[str, Any] = {"options": options.to_json()}
    if options.quantized_model == run.options.quantized_model:
        identity = manifest["quantized"]["fingerprint"] if options.quantized_model else None
        codes = Lazy(identity, lambda: _codes(here, decoder)[0].value)
    else:
        codes, noted = _codes(here, decoder)
        facts |= noted
    return Job(
        run=run,
        ui=ui,
        options=here,
        decoder=decoder,
        fingerprint=fingerprint,
        source=Lazy(fingerprint, lambda: resolve(here.model)),
        codes=codes,
        sources=manifest["sources"],
        facts=facts,
    )


# -- facts of engine and model -----------------------------------------------------------------------------------


def capabilities_of(engine: str, provider: str = "cpu") -> Capabilities:
    """The capabilities of an engine.

    Raises:
        UsageError: there is no such engine or provider.
    """
    return load_engine(engine, provider).capabilities


def model_facts(
    decoder: DecoderSpec, maps_tap: str = "", kinds: Iterable[str] = (), *, fits: bool = True
) -> ModelFacts:
    """What options depend on in a model: the facts of its architecture, and these.

    Raises:
        NblError: the architecture is unknown, which an edited manifest can cause.
    """
    architecture = decoder.architecture
    if architecture not in ARCHITECTURES:
        raise NblError(f"architecture {architecture!r} is not supported; {supported_near(architecture)}")
    record = ARCHITECTURES[architecture]
    no_exit = exits_refused(architecture, has_window=bool(decoder.sliding_window))
    return ModelFacts(maps_tap, frozenset(kinds), architecture, record.taps, record.not_from, no_exit, decoder, fits)


def _facts_of(source: Source, decoder: DecoderSpec) -> ModelFacts:
    try:
        fits = holds(read_shape(source.gguf or source.directory).parameters)
    except NblError:  # it does not state its sizes
        fits = True
    maps = source.linearized
    return model_facts(decoder, maps.tap if maps else "", maps.kinds if maps else (), fits=fits)


def _refuse_unfit(options: JobOptions, source: Source) -> None:
    """Refuse a model that the form of `--for` cannot hold."""
    name = options.destination
    if name and DESTINATIONS[name].form and not source.linearized:
        from nbl_export.model.checkpoint.pretrained import config_of

        if reason := why_unfit(name, config_of(source.gguf or source.directory), source.directory):
            raise NblError(f"--for {name} is not possible: {reason}")


def why_unfit(name: str, config: Any, directory: Path, layers: tuple[int, ...] = ()) -> str:
    """Why the form of a destination cannot hold a model; "" if it can. Its kinds of layers are not looked at."""
    from nbl_export.targets.checkpoint import edge_llm, nemotron_nas

    form = DESTINATIONS[name].form
    try:
        if form == "edge-llm":
            edge_llm.check(config, {})
        elif form != "transformers":
            nemotron_nas.check(config, layers, form)
        if name == "llama.cpp":
            nemotron_nas.check_vocabulary(directory, config.vocab_size)
    except NblError as error:
        return str(error)
    return ""


def faster_engine(job: Job) -> Engine | None:
    """The engine that reads prompts faster than the job's one on a CPU, if it takes the model at this precision.

    Models with a sliding window are left out: their speed was not compared.
    """
    name = job.engine.capabilities.faster_on_cpu
    if not name or job.decoder.sliding_window:
        return None
    same = ("model", "precision", "quantized_model")
    asked = {"engine": name, **{option: getattr(job.options, option) for option in same}}
    try:
        settle(asked, capabilities_of, model_facts(job.decoder))
    except NblError:
        return None
    refused = capabilities_of(name).refused_rotary
    return None if _rotary_of(job.run.path / "original") in refused else load_engine(name)


def _rotary_of(directory: Path) -> str:
    """The type of rotary embeddings in config.json; "" if it names none."""
    try:
        config = read_json(directory / "config.json")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        return str(rope.get("rope_type") or rope.get("type") or "")
    except (OSError, ValueError, AttributeError):
        return ""


# -- files that options name -----------------------------------------------------------------------------------


def _codes(options: JobOptions, decoder: DecoderSpec) -> tuple[Lazy[Source | None], dict[str, Any]]:
    """The quantised checkpoint of options, and what the manifest says of it."""
    if options.quantized_model is None:
        return Lazy(None, lambda: None), {}
    from nbl_export.methods.checkpoint import quantized

    found = quantized.find(options.quantized_model, decoder)
    about = quantized.describe(found)
    return Lazy(about["fingerprint"], lambda: found), {"quantized": {"name": options.quantized_model, **about}}
