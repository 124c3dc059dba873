"""Checks the options of a run before any work."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.graph.given import GIVEN
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.plan.choose import parse_layers
from nbl_export.records.asked import applying
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.goals import check_request, check_size
from nbl_export.records.options import JobOptions
from nbl_export.run.given import check_graph_options
from nbl_export.run.resolved import (
    case_of,
    chunk_of,
    engine_of,
    slots_of,
)
from nbl_export.targets import ENGINES, load_engine

__all__ = ["check_asked", "check_options", "engine_defaults", "preflight", "require_engine"]


def engine_defaults(engine: str, provider: str = "cpu") -> dict[str, Any]:
    """An engine's default precision and decoder source.

    Raises:
        UsageError: there is no such engine, or it makes no decoders.
    """
    capabilities = load_engine(engine, provider).capabilities
    if not capabilities.sources:
        raise UsageError(
            f"--engine {engine} makes no decoders; engines that do are {', '.join(ENGINES)}. "
            f"nbl-export convert DIR --to {capabilities.graphs} writes the model of a finished run for {engine}"
        )
    return {"precision": capabilities.precisions[0], "decoder_source": capabilities.sources[0]}


def preflight(
    options: JobOptions, given: Collection[str] = (), *, sweeps: bool = False, place: str | None = None
) -> JobOptions:
    """Check options before any work; recorded options that no longer apply return to their defaults.

    Args:
        given: names of the options that were asked for now.
        sweeps: a sweep was asked for.
        place: path of the model, if a run has recorded one.

    Raises:
        UsageError: an option is unknown, has no effect, or does not fit the engine or another option.
        NblError: the decoder source does not make this precision.
    """
    check_request(options)
    engine_of(options).check_options(options.builder_option)
    options = applying(case_of(options, sweeps=sweeps, place=place), given)
    if options.compute_dtype == "bfloat16":
        _check_bfloat16(options)
    if options.decoder_source == GIVEN:
        check_graph_options(options)
        return options
    _check_exported(options)
    return options


def _check_exported(options: JobOptions) -> None:
    """Check precision and decoder source against the engine."""
    capabilities = engine_of(options).capabilities
    for value, allowed, flag in (
        (options.precision, capabilities.precisions, "--precision"),
        (options.decoder_source, capabilities.sources, "--decoder-source"),
    ):
        if value not in allowed:
            raise UsageError(f"{flag} {value} is not for engine {_spoken(options)}; it takes {', '.join(allowed)}")
    makes = capabilities.exporters[options.decoder_source]
    if options.precision not in makes:
        others = [
            f"--decoder-source {name}" for name, made in capabilities.exporters.items() if options.precision in made
        ]
        raise NblError(
            f"the decoder source {options.decoder_source} makes no {options.precision} graph; "
            f"use {' or '.join([*others, '--precision ' + ', '.join(makes)])}"
        )


def _check_bfloat16(options: JobOptions) -> None:
    from nbl_export.model import bfloat16
    from nbl_export.parallel import peers

    bfloat16.chosen(options.compute_dtype, peers.current().device)


def require_engine(options: JobOptions, *, to_prove: bool = False) -> None:
    """Check that the engine is available on this machine.

    Args:
        to_prove: check the engine of verification, which is ONNX Runtime for compiled engines.

    Raises:
        NblError: the engine is not available; the message has the reason.
    """
    engine = engine_of(options)
    name = "ort" if to_prove and engine.capabilities.static else options.engine
    found = (load_engine(name) if name != options.engine else engine).probe()
    if not found.available:
        raise NblError(f"engine {name} is not available here: {found.reason}")


def _spoken(options: JobOptions) -> str:
    return options.engine if options.provider == "cpu" else f"{options.engine} with --provider {options.provider}"


def check_asked(options: JobOptions, architecture: str) -> None:
    """Check tap and decoder source against the architecture, before any computation.

    Raises:
        NblError: the architecture has no such tap, the source does not support it, or it is unknown, which an edited
            manifest can cause.
    """
    if architecture not in ARCHITECTURES:
        raise NblError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    record = ARCHITECTURES[architecture]
    if options.tap not in record.taps:
        raise NblError(
            f"--tap {options.tap} is not possible for {architecture}: no norm stands in front of its attention; "
            f"use --tap {record.taps[0]}"
        )
    if options.decoder_source in record.not_from:
        raise NblError(
            f"--decoder-source {options.decoder_source} is not possible for {architecture}: "
            f"{record.not_from[options.decoder_source]}"
        )


_LEAST_SLOTS = 32


def check_options(options: JobOptions, spec: DecoderSpec) -> None:
    """Check options against the decoder.

    Raises:
        NblError: the decoder lacks a layer, or a token count exceeds its positions.
    """
    if options.layers is not None:
        parse_layers(options.layers, spec.num_layers)
    if options.draft_layers is not None:
        parse_layers(options.draft_layers, spec.num_layers, "--draft-layers")
    source = engine_of(options).capabilities.sources[0]
    if options.draft not in (None, "ngram") and source in ARCHITECTURES[spec.architecture].not_from:
        reason = ARCHITECTURES[spec.architecture].not_from[source]
        raise NblError(f"--draft {options.draft} is not possible for {spec.architecture}: {reason}; use ngram")
    check_size(options, spec, engine_of(options).capabilities.cache_itemsize(options.precision))
    if options.decoder_source != GIVEN:  # a graph states its own structure
        check_asked(options, spec.architecture)
    engine = engine_of(options)
    if engine.compiler:
        _check_lengths(options, spec)
    if options.context > spec.max_positions:
        raise NblError(f"--context {options.context} is beyond the model's {spec.max_positions} positions")
    shortest = min(options.depths) + min(*options.prompt_tokens, options.generate_tokens or _LEAST_DECODE)
    if shortest > slots_of(options, spec):
        raise NblError(
            f"nothing to measure: the shortest test ends at {shortest} tokens, the model has {slots_of(options, spec)} "
            "positions; use a smaller --depth, --prompt-tokens or --generate-tokens"
        )


_LEAST_DECODE = 16  # tokens of the decode test of a large model (`measure.benchmark.decode_tokens`)


def _check_lengths(options: JobOptions, spec: DecoderSpec) -> None:
    slots = slots_of(options, spec)
    if slots > spec.max_positions:
        raise NblError(f"--max-seq-len {slots} is beyond the model's {spec.max_positions} positions")
    if slots < _LEAST_SLOTS:
        raise NblError(f"--max-seq-len {slots} is too short for verification; use at least {_LEAST_SLOTS}")
    if chunk_of(options, spec) > slots:
        raise NblError(f"--prefill-chunk {options.prefill_chunk} is beyond --max-seq-len {slots}")
