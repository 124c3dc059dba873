"""Reads the facts that options are settled by, and checks the machine. What the facts mean is said by `options.rules`.

engine, provider ─► Capabilities
files of the model, or a run's manifest ─► ModelFacts: decoder, architecture, maps
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.checkpoint.source import Source, resolve
from nbl_export.model import memory
from nbl_export.model.architectures import ARCHITECTURES, supported_near
from nbl_export.options.model_facts import ModelFacts
from nbl_export.options.options import CHECKPOINT_FIT, JobOptions
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.targets import load_engine
from nbl_export.text.mixture import absolute_sources

__all__ = [
    "architecture_facts",
    "capabilities_of",
    "check_machine",
    "facts_of_model",
    "facts_of_run",
    "identity_of",
    "read_model",
    "require_engine",
]


def capabilities_of(engine: str, provider: str = "cpu") -> Capabilities:
    """The capabilities of an engine.

    Raises:
        UsageError: there is no such engine or provider.
    """
    return load_engine(engine, provider).capabilities


def read_model(model: str, manifest: Mapping[str, Any]) -> tuple[Source, DecoderSpec]:
    """A model and its sizes, which come from a run's manifest if it has the same model: transformers takes seconds.

    Raises:
        NblError: the model is missing, damaged or not supported.
    """
    source = resolve(model)
    if manifest and manifest["model"]["fingerprint"] == source.fingerprint:
        return source, DecoderSpec(**manifest["decoder"])
    from nbl_export.methods.checkpoint import load

    return source, load.read_spec(source)


def facts_of_model(source: Source, decoder: DecoderSpec) -> ModelFacts:
    """All facts about a model."""
    maps = source.linearized
    known = {"maps_tap": maps.tap, "kinds": frozenset(maps.kinds)} if maps else {}
    return architecture_facts(decoder.architecture, decoder=decoder, fits=_fits(source), **known)


def _fits(source: Source) -> bool:
    try:
        return memory.holds(read_shape(source.gguf or source.directory).parameters)
    except NblError:  # it does not state its sizes
        return True


def facts_of_run(manifest: Mapping[str, Any]) -> ModelFacts:
    """The facts about a run's model, which need not be on this machine."""
    options = JobOptions.from_json(manifest["options"])
    decoder = DecoderSpec(**manifest["decoder"])
    has_maps = options.fit == CHECKPOINT_FIT
    known = {"maps_tap": options.tap, "kinds": frozenset(manifest.get("kinds", ()))} if has_maps else {}
    return architecture_facts(decoder.architecture, decoder=decoder, **known)


def architecture_facts(architecture: str, **known: Any) -> ModelFacts:
    """What options depend on in an architecture, and other facts of a model that are known.

    Raises:
        NblError: the architecture is unknown, which an edited manifest can cause.
    """
    if architecture not in ARCHITECTURES:
        raise NblError(f"architecture {architecture!r} is not supported; {supported_near(architecture)}")
    record = ARCHITECTURES[architecture]
    return ModelFacts(architecture=architecture, taps=record.taps, not_from=record.not_from, **known)


# -- the machine --------------------------------------------------------------------------------------------------


def check_machine(options: JobOptions, *, runs_engine: bool) -> None:
    """Check that this machine can do what is asked for.

    Raises:
        NblError: the processor has no bfloat16 products, or GPU or engine is not available; the message has the reason.
    """
    if options.device != "auto" or options.compute_dtype == "bfloat16":
        from nbl_export.model import bfloat16, device

        bfloat16.chosen(options.compute_dtype, device.chosen(options.device, 0))
    if runs_engine:
        require_engine(options)


def require_engine(options: JobOptions, *, for_verification: bool = False) -> None:
    """Check that the engine is available on this machine.

    Args:
        to_prove: check the engine of verification, which differs for compiled engines.

    Raises:
        NblError: the engine is not available; the message has the reason.
    """
    engine = load_engine(options.engine, options.provider)
    name = options.engine
    if for_verification and (prover := engine.capabilities.verified_by):
        engine = load_engine(prover)
        name = prover
    found = engine.probe()
    if not found.available:
        raise NblError(f"engine {name} is not available here: {found.reason}")


# -- what a run records -------------------------------------------------------------------------------------------


def identity_of(options: JobOptions, source: Source, spec: DecoderSpec) -> dict[str, Any]:
    """The manifest's facts about model and decoder, with the paths of model and text."""
    return {
        "model": {
            "name": options.model,
            "title": source.title,
            "revision": source.revision,
            "architecture": spec.architecture,
            "fingerprint": source.fingerprint,
        },
        "decoder": dataclasses.asdict(spec),
        "places": {"model": source.place, "calibration": absolute_sources(options.calibration)},
        "num_layers": spec.num_layers,
    }
