"""Linear layers in place of attention, in an IR.

    before   x -- norm -- qkv -- states -- attention -- o_proj -+      after   x -- MatMul(W') -- Add(b) -+
             x ------------------------------------------------ join           x -------------------- join

If a map adds nothing, the readers of the join get x. The old block loses its reader and is not saved (see
`drop_states`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.anatomy import Block, Dataflow, State, states_of
from nbl_export.graph.names import constant_name, node_name, product_name
from nbl_export.methods.base import Mixer, tapped

__all__ = ["bypass_attention", "drop_states"]


def bypass_attention(model: Any, mixers: Mapping[int, Mixer], tap: str) -> None:
    """Replace the attention of layers by mixers, in place.

    Raises:
        RefusalError: a block is not understood, has another width, or lacks the tap.
    """
    flow = Dataflow(model)
    for block in [flow.block(layer) for layer in sorted(mixers)]:
        mixer = mixers[block.layer]
        _check_width(block, mixer)
        x = tapped(block, tap)
        matrices, vectors = mixer.stored()
        if not matrices:
            for reader in block.join.output(0).get_target_inputs():
                reader.replace_source_output(block.residual)
            continue
        build = _Linear(block.layer)
        for name, matrix in matrices.items():
            x = build.matmul(x, matrix, name)
        for name, vector in vectors.items():
            x = build.add(x, vector, name)
        block.join.input(block.branch).replace_source_output(x)


class _Linear:
    """Nodes of a linear layer in an IR."""

    def __init__(self, layer: int) -> None:
        from openvino import opset13

        self._ops = opset13
        self._layer = layer

    def matmul(self, x: Any, matrix: np.ndarray, name: str) -> Any:
        weight = self._constant(name, np.ascontiguousarray(matrix, np.float32))  # [outputs, inputs]
        return self._ops.matmul(x, weight, False, True, name=product_name(self._layer, name)).output(0)

    def add(self, x: Any, other: np.ndarray, name: str) -> Any:
        term = self._constant(name, other.astype(np.float32).reshape(1, 1, -1))
        return self._ops.add(x, term, name=node_name(self._layer, "Add")).output(0)

    def _constant(self, name: str, array: np.ndarray) -> Any:
        return self._ops.constant(array, name=constant_name(self._layer, name))


def _check_width(block: Block, mixer: Mixer) -> None:
    width = block.join.get_output_partial_shape(0)[-1]
    if width.is_static and width.get_length() != mixer.size:
        raise RefusalError(block.layer, f"its attention output is {width.get_length()} wide, the map {mixer.size}")


def drop_states(model: Any, layers: Collection[int]) -> None:
    """Remove the key/value states of layers, in place; run after `bypass_attention`.

    A graph may read the lengths of all layers from one layer's state (ShapeOf). These readers first get a kept state,
    which has the same dimensions.

    Raises:
        RefusalError: no layer would keep its states, or a result still reads a removed one.
    """
    before = states_of(model)
    kept = [layer for layer in before if layer not in layers]
    if not kept:
        raise RefusalError(None, "no attention layer would keep its cache; keep at least one")
    for layer in sorted(set(layers) & set(before)):
        for state, replacement in zip(before[layer], before[kept[0]], strict=True):
            _repoint_shape_readers(state, replacement)
            model.remove_sink(state.assign)
            model.remove_variable(model.get_variable_by_id(state.variable))
    model.validate_nodes_and_infer_types()
    after = states_of(model)
    for layer in after:
        if layer in layers:
            raise RefusalError(layer, f"its state {after[layer][0].variable} is still read")


def _repoint_shape_readers(state: State, replacement: State) -> None:
    """Give each ShapeOf of the state, before or after the new tokens, the same value of another state."""
    for old, new in zip(_chain(state.read), _chain(replacement.read), strict=False):
        for user in old.output(0).get_target_inputs():
            if user.get_node().get_type_name() == "ShapeOf":
                user.replace_source_output(new.output(0))


def _chain(read: Any) -> list[Any]:
    """The ReadValue node, the Gather that reorders it by beam_idx, and the Concat that adds the new tokens."""
    found = [read]
    for kind in ("Gather", "Concat"):
        readers = [i.get_node() for i in found[-1].output(0).get_target_inputs()]
        found += [node for node in readers if node.get_type_name() == kind][:1]
    return found
