"""Moves the caches of a decoder into the model, as states; beams are reordered by an input beam_idx.

    past_key_values.0.key ── Concat ── present.0.key
    becomes   ReadValue (empty at first) ── Gather(beam_idx) ── Concat ── Assign

This is the form that OpenVINO GenAI and optimum-intel run, and that the CPU plugin turns into a cache of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["make_stateful"]

_PAST, _PRESENT = "past_key_values.", "present."
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
