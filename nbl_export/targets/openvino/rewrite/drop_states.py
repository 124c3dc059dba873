"""Removes the key/value states of replaced layers from an IR.

    before   states key.0 value.0 key.1 value.1 key.2 value.2      (1 replaced)
    after    states key.0 value.0 key.2 value.2

A graph may read the lengths of all layers from one layer's state (ShapeOf). These readers first get a kept state, which
has the same dimensions. Refuses a state that a result still depends on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.targets.openvino.ir.states import State, states_of

__all__ = ["drop_states"]


def drop_states(model: Any, layers: Collection[int]) -> None:
    """Remove the states of layers, in place; run after `bypass_attention`.

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
            raise RefusalError(layer, f"its state {after[layer].key.variable} is still read")


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
