"""Options of a run on an ONNX graph, on a GGUF file, or on an NBL checkpoint, which lacks the removed attention."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.formats.gguf.blocks import check_type
from nbl_export.graph.given import GIVEN, graph_of
from nbl_export.model.checkpoint import gguf_file
from nbl_export.model.checkpoint.nbl import GIVEN_FIT, NO_ORIGINAL
from nbl_export.model.checkpoint.source import gguf_of
from nbl_export.records.asked import refuse_idle
from nbl_export.records.options import JobOptions
from nbl_export.run.resolved import case_of
from nbl_export.targets.base import GGUF

__all__ = [
    "adapt_to_gguf",
    "adapt_to_graph",
    "adapt_to_maps",
    "check_graph_options",
    "check_types",
    "refuse_changes",
]

PRECISIONS = ("fp32", "fp16", "int8", "int4")
_ROUNDED = ("int8", "int4")
_USEFUL = ("accuracy_level", "fuse_mlp_gate_up")  # builder options that change no value of a matrix


def adapt_to_graph(options: JobOptions) -> JobOptions:
    """Set decoder source and precision if the model is a graph; other options are returned unchanged.

    Raises:
        UsageError: the options ask for another precision.
        NblError: the graph is not supported.
    """
    graph = graph_of(Path(options.model).expanduser())
    if graph is None:
        if options.decoder_source == GIVEN:
            raise UsageError(f"--decoder-source {GIVEN} is for a model that is an ONNX graph; leave it out")
        return options
    from nbl_export.rewrite.describe import describe_graph

    _check_engine(options)
    precision = describe_graph(graph)["precision"]
    if precision not in PRECISIONS:
        raise NblError(f"the matrices of {graph} are {precision}; supported are {', '.join(PRECISIONS)}")
    if options.precision not in (precision, "fp32"):
        raise UsageError(f"--precision {options.precision}: {graph} is {precision} and keeps it; leave --precision out")
    return dataclasses.replace(options, decoder_source=GIVEN, precision=precision)


def check_graph_options(options: JobOptions) -> None:
    """Refuse options that need the torch model.

    Raises:
        UsageError: the message names the option.
    """
    wants = {
        "--fit distilled": options.fit == "distilled",
        f"--select {options.select}": options.select in ("greedy", "efficient"),
        "--calibration self": options.says_itself,
    }
    asked = [name for name, wanted in wants.items() if wanted]
    if asked:
        raise UsageError(f"{asked[0]} needs the torch model, and {options.model} is an ONNX graph; give the checkpoint")
    if options.draft not in (None, "ngram"):
        raise UsageError(f"--draft {options.draft} needs a checkpoint, and {options.model} is an ONNX graph; use ngram")
    _check_engine(options)


def _check_engine(options: JobOptions) -> None:
    if options.engine != "ort" or options.provider != "cpu":
        raise UsageError(f"{options.model} is an ONNX graph, which only --engine ort with --provider cpu takes")


def refuse_changes(recorded: JobOptions, options: JobOptions) -> None:
    """Refuse a change of decoder source or precision in a run on a graph, or a change to such a run.

    Raises:
        UsageError: the options change one of the two.
    """
    if GIVEN not in (recorded.decoder_source, options.decoder_source):
        return
    for name in ("decoder_source", "precision"):
        if getattr(recorded, name) != getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)} cannot be chosen for this run's graph"
            )


def adapt_to_maps(options: JobOptions, source: Any) -> JobOptions:
    """Set tap and fit if the `checkpoint.Source` is an NBL checkpoint; other options are returned unchanged.

    Raises:
        UsageError: an option needs the removed attention, or another kind of model.
    """
    if source.linearized is None:
        if options.fit == GIVEN_FIT:
            raise UsageError(f"--fit {GIVEN_FIT} is for a checkpoint with maps (nbl-export convert)")
        return options
    tap = source.linearized.tap
    if options.fit in ("distilled", "drop"):
        raise UsageError(f"--fit {options.fit} needs the original model: {NO_ORIGINAL}")
    refuse_idle(case_of(dataclasses.replace(options, fit=GIVEN_FIT)))
    if options.says_itself:
        raise UsageError(
            f"--calibration self needs the original model: {NO_ORIGINAL}; give that model, or leave it out"
        )
    if options.tap not in ("residual", tap):
        raise UsageError(f"--tap {options.tap}: the maps of {options.model} have the tap {tap}; leave --tap out")
    return dataclasses.replace(options, fit=GIVEN_FIT, tap=tap)


def adapt_to_gguf(options: JobOptions, place: str | None = None) -> JobOptions:
    """Set the precision to `GGUF` if int8 or int4 is asked of a GGUF file; other options are returned unchanged.

    Args:
        place: path of the model, if a run has recorded one.

    Raises:
        UsageError: the precision `GGUF` does not fit the model or another option.
    """
    applies = options.engine == "ort" and options.provider == "cpu" and options.decoder_source == "genai"
    is_gguf = gguf_of(Path(place or options.model).expanduser()) is not None
    if options.precision == GGUF and not (is_gguf and applies):
        where = "of --decoder-source genai on a CPU" if is_gguf else "for a model that is a .gguf file"
        raise UsageError(f"--precision {GGUF} is {where}; choose another precision")
    if not (is_gguf and applies and options.precision in (*_ROUNDED, GGUF)) or options.requantize:
        return options
    for given, flag in ((options.quantized_model, "--quantized-model"), (_rounding(options), "--builder-option")):
        if given:
            raise UsageError(
                f"{flag} {given} quantises the model again, and {options.model} has codes of its own; add --requantize "
                "with --precision int8 or int4, or leave it out"
            )
    return dataclasses.replace(options, precision=GGUF)


def check_types(options: JobOptions, gguf: Path | None) -> None:
    """Check that graphs can have the codes of a file, if the options ask for them.

    Raises:
        NblError: a matrix has an unknown type.
    """
    if gguf is not None and options.precision == GGUF:
        for tensor in gguf_file.reader(gguf).tensors:
            if len(tensor.shape) == 2:
                check_type(tensor.name, tensor.tensor_type.name)


def _rounding(options: JobOptions) -> str | None:
    return next((word for word in options.builder_option if word.partition("=")[0] not in _USEFUL), None)
