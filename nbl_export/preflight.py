"""What is wrong with the options of a job, said before any work."""

from __future__ import annotations

from typing import Any

from nbl_export import nbl_checkpoint
from nbl_export.engines import load_engine
from nbl_export.errors import NblError, UsageError
from nbl_export.goals import check_request
from nbl_export.graph_source import GIVEN, check_given
from nbl_export.job import engine_of
from nbl_export.nbl_checkpoint import GIVEN_FIT
from nbl_export.records import JobOptions

__all__ = ["engine_defaults", "preflight", "require_engine"]


def engine_defaults(engine: str, provider: str = "cpu") -> dict[str, Any]:
    """Options that an engine chooses where nobody else does."""
    capabilities = load_engine(engine, provider).CAPABILITIES
    return {"precision": capabilities.precisions[0], "decoder_source": capabilities.sources[0]}


def preflight(options: JobOptions) -> None:
    """Check engine, precision and decoder source before any work; for a graph, what it cannot do.

    Raises:
        UsageError: unknown.
        NblError: a source that does not make this precision.
    """
    from nbl_export.decoders import PRECISIONS, genai

    check_request(options)
    if options.fit == GIVEN_FIT:
        nbl_checkpoint.check_options(options)
    if options.decoder_source == GIVEN:
        check_given(options)
        return
    engine = engine_of(options)
    capabilities = engine.CAPABILITIES
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
        (options.map_bits, "--map-bits", "--precision int8 or int4 on engine ort", _is_weight_only(options)),
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


def _is_int4(options: JobOptions) -> bool:
    return options.precision == "int4" and options.decoder_source == "genai"


def _is_weight_only(options: JobOptions) -> bool:
    """Whether the graph's matrices are MatMulNBits, and the maps' may have bits of their own."""
    return options.precision in ("int8", "int4") and options.engine == "ort"


def require_engine(options: JobOptions, *, to_prove: bool = False) -> None:
    """to_prove: what verification needs, which for compiled engines is ONNX Runtime."""
    engine = engine_of(options)
    name = "ort" if to_prove and engine.CAPABILITIES.static else options.engine
    found = (load_engine(name) if name != options.engine else engine).probe()
    if not found.available:
        raise NblError(f"engine {name} is not available here: {found.reason}")


def _spoken(options: JobOptions) -> str:
    return options.engine if options.provider == "cpu" else f"{options.engine} with --provider {options.provider}"
