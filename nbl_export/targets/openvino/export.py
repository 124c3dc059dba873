"""OpenVINO's own front end: a stateful IR of the torch model, its weights compressed by nncf.

    past_key_values.0.key ── Concat ── present.0.key
    becomes   ReadValue (empty at first) ── Gather(beam_idx) ── Concat ── Assign

A state is what the CPU plugin turns into a cache of its own; beams are reordered by an input beam_idx.

The folder is what OpenVINO GenAI (`LLMPipeline`) and optimum-intel (`OVModelForCausalLM`) load. optimum-intel itself is
not used: optimum-intel 2.2 requires transformers below 5.6 and huggingface-hub below 1.22, which would hold back every
other part of this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from nbl_export.errors import MissingPackageError
from nbl_export.targets.export.finish import add_text_files, captured
from nbl_export.targets.openvino.trace import convert

__all__ = ["build", "make_stateful"]


def build(checkpoint: Path, out: Path, precision: str, mapped: bool = False) -> None:
    """Write openvino_model.xml and .bin, the tokenizer as IR, and the checkpoint's text files to `out`.

    Args:
        mapped: the weights stay in the checkpoint's files, from which nncf takes one matrix after the other.

    Raises:
        NblError: OpenVINO refuses the checkpoint; the message has the reason.
        MissingPackageError: openvino, openvino-tokenizers or nncf is not installed.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino", "making an IR") from error
    from nbl_export.graph.ir.files import save_ir
    from nbl_export.methods.checkpoint import load
    from nbl_export.targets.openvino.rewrite import compress

    out.mkdir(parents=True)
    with captured("OpenVINO", checkpoint):
        model = load.load_mapped(checkpoint) if mapped else load.load_model(checkpoint)
        found = convert(model)
        make_stateful(found)
        group = _group(model, precision)
        save_ir(compress(found, precision, group=group), out, precision, group)
        del model, found
    add_text_files(checkpoint, out)
    _convert_tokenizer(checkpoint, out)


def _group(model: Any, precision: str) -> int:
    from nbl_export.targets.openvino.rewrite import group_size

    if precision != "int4":
        return 0
    widths = {m.weight.shape[1] for m in model.get_decoder().modules() if isinstance(m, nn.Linear)}
    return group_size(model.config.hidden_size, tuple(sorted(widths)))


def _convert_tokenizer(checkpoint: Path, out: Path) -> None:
    """Write tokenizer and detokenizer as IRs, for OpenVINO GenAI.

    Raises:
        NblError: openvino-tokenizers does not convert the tokenizer.
    """
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError as error:
        raise MissingPackageError("openvino-tokenizers", "openvino", "converting the tokenizer") from error
    import openvino

    from nbl_export.graph.names import DETOKENIZER_IR, TOKENIZER_IR
    from nbl_export.methods.checkpoint import load

    with captured("openvino-tokenizers", checkpoint):
        pair: Any = convert_tokenizer(load.load_tokenizer(checkpoint), with_detokenizer=True)
        for model, name in zip(pair, (TOKENIZER_IR, DETOKENIZER_IR), strict=True):
            openvino.save_model(model, str(out / name), compress_to_fp16=False)


# -- states ---------------------------------------------------------------------------------------------

_PAST = "past_key_values."
_PRESENT = "present."
_BATCH = 0  # axis of a cache [batch, heads, tokens, head size]


def make_stateful(model: Any) -> None:
    """Make the caches of all layers states, in place."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    names = [name for port in model.inputs if (name := port.get_any_name()).startswith(_PAST)]
    _reorder_beams(model, names)
    pairs = {name: _PRESENT + name.removeprefix(_PAST) for name in names}
    apply_make_stateful_transformation(model, pairs)
    _start_empty(model)
    model.validate_nodes_and_infer_types()


def _reorder_beams(model: Any, names: list[str]) -> None:
    import openvino
    from openvino import opset13 as ops

    beams = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beams])
    for name in names:
        past = model.input(name)
        readers = past.get_target_inputs()
        ordered = ops.gather(past, beams, ops.constant(_BATCH, dtype="int64"))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    model.validate_nodes_and_infer_types()


def _start_empty(model: Any) -> None:
    """Give each state its first value: no tokens, for the batch of the input ids."""
    from openvino import opset13 as ops

    shape = ops.shape_of(model.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0], dtype="int64"), ops.constant(0, dtype="int64"))
    for node in model.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        sizes = [dim.get_length() if dim.is_static else 0 for dim in node.get_output_partial_shape(0)]
        dims = [ops.constant(np.array([size], np.int64)) for size in sizes[1:]]
        zero = ops.constant(0.0, dtype="float32")
        node.set_arguments([ops.broadcast(zero, ops.concat([batch, *dims], 0))])
