"""The static-cache decoder of mobius, built in process and brought to the form that TensorRT accepts (`static_form`).

mobius' command line would do the same, but its progress bar cannot be turned off. This module uses the public parts:
registry, configuration class, build_from_module, apply_weights. execution_provider="onnx-standard" keeps contrib
operators out. `apply_weights` folds the Transpose in front of every MatMul, except that of a tied lm_head, because
Gather reads the embedding too. TensorRT folds that Transpose without a copy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.files import read_graph
from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE, STATIC_GRAPH_FILE, all_logits_file
from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.model.architectures import windows_of
from nbl_export.model.checkpoint.pretrained import config_of, explained
from nbl_export.model.checkpoint.weights import weight_files
from nbl_export.targets.export.finish import add_text_files, captured
from nbl_export.targets.export.mobius import corrected, refuse_lost_biases
from nbl_export.targets.tensorrt.static_form import PRECISIONS, finish_passes, form_passes
from nbl_export.targets.tensorrt.static_form.numbers import CastFloats

__all__ = ["build", "build_form", "finish", "save_graph", "write_float32"]


def build(checkpoint: Path, out: Path, precision: str, *, max_seq_len: int) -> None:
    """Write decoder.onnx with the logits of all positions, its data and the tokenizer to `out`.

    Args:
        precision: fp32, fp16, bf16, or int4 (blocks of int4 with fp16 arithmetic).
        max_seq_len: slots of a cache: the longest sequence, answer included.

    Raises:
        NblError: the precision or the model is unknown, or the length exceeds the model's positions.
    """
    if precision not in PRECISIONS:
        raise NblError(f"the static source makes no {precision} graph; use --precision {', '.join(PRECISIONS)}")
    model = build_form(checkpoint, max_seq_len)
    finish(model, precision)
    save_graph(model, out)
    add_text_files(checkpoint, out)


def build_form(checkpoint: Path, max_seq_len: int) -> ir.Model:
    """Build the static form in float32 with all logits, in memory.

    Raises:
        NblError: see `build`.
    """
    with explained(f"{checkpoint} has no usable configuration"):
        config = config_of(checkpoint)
    refuse_lost_biases(checkpoint)
    _refuse_length(max_seq_len, config)
    with captured("mobius", checkpoint), corrected(checkpoint):
        model = _mobius_decoder(checkpoint, config, max_seq_len)
    run_passes(form_passes(max_seq_len, windows_of(config)), model)
    model.metadata_props["nbl.form"] = "static"
    return model


def finish(model: ir.Model, precision: str) -> None:
    """Bring the form to the deployed precision, in place."""
    run_passes(finish_passes(precision), model)


def save_graph(model: ir.Model, out: Path, name: str = STATIC_GRAPH_FILE) -> None:
    """Write graph and data to a directory, which is created if needed."""
    out.mkdir(parents=True, exist_ok=True)
    ir.save(model, out / name, external_data=f"{name}.data")


def write_float32(directory: Path, out: Path) -> None:
    """Write a float32 copy of a directory's graphs: a CPU cannot run bf16, and runs fp16 inexactly."""
    model = read_graph(directory / all_logits_file(directory))
    CastFloats(ir.DataType.FLOAT)(model)
    save_graph(model, out, GRAPH_FILE)
    if (directory / ALL_LOGITS_FILE).is_file():
        keep_last_token(out)


def _refuse_length(max_seq_len: int, config: Any) -> None:
    if not 2 <= max_seq_len <= config.max_position_embeddings:
        raise NblError(
            f"--max-seq-len {max_seq_len} is not possible: this model has {config.max_position_embeddings} positions; "
            f"use 2 to {config.max_position_embeddings}"
        )


def _mobius_decoder(checkpoint: Path, config: Any, max_seq_len: int) -> ir.Model:
    """mobius' own static-cache graph with the checkpoint's weights."""
    try:
        import mobius
    except ImportError as error:
        raise MissingPackageError("mobius-onnx", "export", "building the decoder graph") from error
    kind = config.model_type
    if kind not in mobius.registry:
        raise NblError(f"mobius has no builder for model type {kind!r}")
    config_class = mobius.registry.get_config_class(kind) or mobius.ArchitectureConfig
    settings = dataclasses.replace(config_class.from_transformers(config), dtype=ir.DataType.FLOAT)
    module = mobius.registry.get(kind)(settings)
    task = mobius.CausalLMTask(static_cache=True, max_seq_len=max_seq_len)
    package = mobius.build_from_module(module, settings, task, execution_provider="onnx-standard")
    package.apply_weights(module.preprocess_weights(_read_weights(checkpoint)))
    model: ir.Model = package["model"]
    missing = [name for name, value in model.graph.initializers.items() if value.const_value is None]
    if missing:
        raise NblError(f"{checkpoint} lacks {len(missing)} weights that the decoder needs, the first is {missing[0]}")
    return model


def _read_weights(checkpoint: Path) -> dict[str, Any]:
    """All tensors of a safetensors checkpoint, mapped from the files."""
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for file in weight_files(checkpoint):
        state.update(load_file(str(file)))
    return state
