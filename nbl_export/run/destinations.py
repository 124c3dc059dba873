"""Where a model can be served and where not, with the reason: before a job, and of a finished run."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.source import Source
from nbl_export.options.options import CHECKPOINT_FIT, JobOptions
from nbl_export.records.destinations import DESTINATIONS
from nbl_export.records.plan import USUAL_KIND
from nbl_export.run_directory import DECODERS, RunDirectory
from nbl_export.targets import load_engine

__all__ = ["Route", "refuse_unfit", "routes"]


@dataclass(frozen=True)
class Route:
    """A destination of a run: what to serve there, or why it cannot have the model."""

    name: str
    title: str
    take: str
    reason: str


def refuse_unfit(options: JobOptions, source: Source) -> None:
    """Refuse a model that the form of `--for` cannot hold.

    Raises:
        NblError: the message has the reason.
    """
    name = options.destination or ""
    if name not in DESTINATIONS or not DESTINATIONS[name].form or source.linearized is not None:
        return
    from nbl_export.model.checkpoint.pretrained import config_of

    if reason := _unfit(name, config_of(source.gguf or source.directory), source.directory, ()):
        raise NblError(f"--for {name} is not possible: {reason}")


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
        reason = _unfit(name, config, directory / DECODERS["original"], plan.layers)
    command = f"nbl-export convert {shlex.quote(str(directory))} --to {name} --output NEW"
    return Route(name, place.title, command, reason)


def _unfit(name: str, config: Any, directory: Path, layers: Iterable[int]) -> str:
    """Why the form of a destination cannot hold a model; "" if it can. Its kinds of layers are not looked at."""
    from nbl_export.targets.checkpoint import edge_llm, nemotron_nas

    form = DESTINATIONS[name].form
    try:
        if form == "edge-llm":
            edge_llm.check(config, {})
        elif form != "transformers":
            nemotron_nas.check(config, tuple(layers), form)
        if name == "llama.cpp":
            nemotron_nas.check_vocabulary(directory, config.vocab_size)
    except NblError as error:
        return str(error)
    return ""
