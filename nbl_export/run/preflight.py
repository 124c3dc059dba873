"""Checks the options of a run before any work."""

from __future__ import annotations

from typing import Any

from nbl_export.engines import load_engine
from nbl_export.errors import NblError, UsageError
from nbl_export.graph.given import GIVEN
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.model.checkpoint.nbl import GIVEN_FIT
from nbl_export.plan.choose import parse_layers
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.goals import check_request, check_size
from nbl_export.records.options import JobOptions
from nbl_export.records.proposers import AUTO
from nbl_export.run.given import check_graph_options, check_maps_options
from nbl_export.run.resolved import chunk_of, engine_of, slots_of

__all__ = ["check_asked", "check_options", "engine_defaults", "preflight", "require_engine"]


def engine_defaults(engine: str, provider: str = "cpu") -> dict[str, Any]:
    """An engine's default precision and decoder source."""
    capabilities = load_engine(engine, provider).capabilities
    return {"precision": capabilities.precisions[0], "decoder_source": capabilities.sources[0]}


def preflight(options: JobOptions) -> None:
    """Check engine, precision and decoder source before any work; for a graph, refuse options that need a checkpoint.

    Raises:
        UsageError: an option is unknown, or does not fit the engine or another option.
        NblError: the decoder source does not make this precision.
    """
    from nbl_export.decoders import PRECISIONS, genai

    check_request(options)
    if options.compute_dtype == "bfloat16":
        _check_bfloat16(options)
    if options.fit == GIVEN_FIT:
        check_maps_options(options)
    _check_draft(options)
    if options.decoder_source == GIVEN:
        check_graph_options(options)
        return
    engine = engine_of(options)
    capabilities = engine.capabilities
    for value, allowed, flag in (
        (options.precision, capabilities.precisions, "--precision"),
        (options.decoder_source, capabilities.sources, "--decoder-source"),
    ):
        if value not in allowed:
            raise UsageError(f"{flag} {value} is not for engine {_spoken(options)}; it takes {', '.join(allowed)}")
    for name in ("max_seq_len", "max_batch", "prefill_chunk"):
        if getattr(options, name) is not None and not capabilities.static:
            raise UsageError(f"--{name.replace('_', '-')} is not for engine {options.engine}, which compiles nothing")
    if options.batches != (1,) and capabilities.static:
        raise UsageError(f"--batch is not for engine {options.engine}, which is measured on one sequence")
    genai.check_options(options.builder_option)
    for given, flag, condition, fits in (
        (options.builder_option, "--builder-option", "--decoder-source genai", options.decoder_source == "genai"),
        (options.quantized_model, "--quantized-model", "--precision int4 of --decoder-source genai", _is_int4(options)),
        (
            options.quantize == "awq",
            "--quantize awq",
            "--precision int4 of --decoder-source genai on a CPU",
            _is_rounded(options),
        ),
    ):
        if given and not fits:
            raise UsageError(f"{flag} is for {condition}; leave it out")
    makes = PRECISIONS[options.decoder_source] if options.provider == "cpu" else capabilities.precisions
    if options.precision not in makes:
        sources = {name: made for name, made in PRECISIONS.items() if name in capabilities.sources}
        others = [f"--decoder-source {name}" for name, made in sources.items() if options.precision in made]
        raise NblError(
            f"the decoder source {options.decoder_source} makes no {options.precision} graph; "
            f"use {' or '.join([*others, '--precision ' + ', '.join(makes)])}"
        )


def _check_draft(options: JobOptions) -> None:
    """Refuse `--draft` where nothing can propose tokens, or where no checkpoint makes the draft."""
    if options.draft_layers is not None and options.draft not in ("nbl", AUTO):
        raise UsageError("--draft-layers is for --draft nbl or auto; leave it out")
    if options.draft is None:
        return
    if not engine_of(options).capabilities.proposers:
        raise UsageError(f"--draft is for engines ort and openvino on a CPU, not for {_spoken(options)}")
    if options.fit == GIVEN_FIT:
        raise UsageError(
            "--draft needs the original's attention, which an NBL checkpoint lacks; give the original model"
        )
    if options.decoder_source == GIVEN and options.draft != "ngram":
        raise UsageError(f"--draft {options.draft} needs a checkpoint, and {options.model} is an ONNX graph; use ngram")


def _check_bfloat16(options: JobOptions) -> None:
    from nbl_export.model import bfloat16
    from nbl_export.parallel import peers

    if options.decoder_source == GIVEN:
        raise UsageError("--compute-dtype bfloat16 is for a torch model; a graph computes in its own types")
    bfloat16.chosen(options.compute_dtype, peers.current().device)


def _is_int4(options: JobOptions) -> bool:
    return options.precision == "int4" and options.decoder_source == "genai"


def _is_rounded(options: JobOptions) -> bool:
    """Whether the GenAI builder rounds the model's matrices to int4."""
    return _is_int4(options) and options.provider == "cpu" and options.quantized_model is None


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
    check_size(options, spec)
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
