"""Finds the attention block of a layer in an IR, by the dataflow.

    x ── norm ─┬─ q, k, v ── state ── attention ── product (o_proj) ── ... ── join (Add)
    │          normed                                                          │
    └──────────────────────── residual ────────────────────────────────────────┘

The states are the start. The join is the first addition behind the states whose other operand is an ancestor of the
layer's keys: a mask, a bias and the epsilon of a norm are not. So names of nodes do not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import RefusalError
from nbl_export.targets.openvino.ir.states import LayerStates, states_of

__all__ = ["Block", "Dataflow"]

_RANK = 3  # of the residual stream


@dataclass(frozen=True)
class Block:
    """The attention block of a layer.

    Attributes:
        join: the addition of attention's output to the residual stream.
        branch: number of join's input that attention feeds.
        residual: value x that join adds, the layer's input.
        normed: the value that the first products of the attention multiply; None if there are several, or if it is x.
        product: the last product of the attention (o_proj).
        data: number of product's input that is not its matrix.
    """

    layer: int
    states: LayerStates
    join: Any
    branch: int
    residual: Any
    normed: Any | None
    product: Any
    data: int


class Dataflow:
    """The order of a model's nodes, and which nodes depend on which."""

    def __init__(self, model: Any) -> None:
        self.nodes: Sequence[Any] = model.get_ordered_ops()
        self.states = states_of(model)
        self._names = [node.get_name() for node in self.nodes]
        self._place = {name: k for k, name in enumerate(self._names)}
        self._reads = [[value.get_node().get_name() for value in node.input_values()] for node in self.nodes]
        sources = [n for n in self.nodes if n.get_type_name() in ("Parameter", "ReadValue")]
        self._moving = self.below(sources)

    def below(self, sources: Iterable[Any]) -> set[str]:
        """Names of the nodes that depend on sources, sources included."""
        found = {node.get_name() for node in sources}
        for name, reads in zip(self._names, self._reads, strict=True):
            if not found.isdisjoint(reads):
                found.add(name)
        return found

    def above(self, node: Any) -> set[str]:
        """Names of the nodes that a node depends on, itself included."""
        found = {node.get_name()}
        for name, reads in zip(reversed(self._names), reversed(self._reads), strict=True):
            if name in found:
                found.update(reads)
        return found

    def is_constant(self, value: Any) -> bool:
        """Whether a value depends on no input and no state."""
        return value.get_node().get_name() not in self._moving

    def block(self, layer: int) -> Block:
        """The attention block of a layer.

        Raises:
            RefusalError: the layer has no states, or its block is not as drawn above.
        """
        if layer not in self.states:
            raise RefusalError(layer, f"the IR has states for layers {list(self.states)} only")
        states = self.states[layer]
        behind, earlier = self.below(s.read for s in states), self.above(states.key.assign)
        for node in self.nodes:
            if node.get_name() not in behind or not _adds_vectors(node):
                continue
            inside = [value.get_node().get_name() in behind for value in node.input_values()]
            if sum(inside) != 1:
                continue
            residual = node.input_value(inside.index(False))
            if residual.get_node().get_name() in earlier and not self.is_constant(residual):
                return self._described(layer, node, inside.index(True), residual, behind)
        raise RefusalError(layer, "no addition joins its attention with the residual stream")

    def _described(self, layer: int, join: Any, branch: int, residual: Any, behind: set[str]) -> Block:
        end, start = self._place[join.get_name()], self._place[residual.get_node().get_name()]
        inner = self.below([residual.get_node()])
        products = [
            (node, data)
            for node in self.nodes[start:end]
            if node.get_type_name() == "MatMul" and node.get_name() in inner
            for data in (0, 1)
            if self.is_constant(node.input_value(1 - data)) and not self.is_constant(node.input_value(data))
        ]
        last = [(node, data) for node, data in products if node.get_name() in behind]
        first = [node.input_value(data) for node, data in products if node.get_name() not in behind]
        if not last:
            raise RefusalError(layer, "no product stands between its attention and the residual stream")
        same = {(value.get_node().get_name(), value.get_index()) for value in first}
        own = (residual.get_node().get_name(), residual.get_index())
        normed = first[0] if len(same) == 1 and own not in same else None
        return Block(layer, self.states[layer], join, branch, residual, normed, *last[0])


def _adds_vectors(node: Any) -> bool:
    """Whether a node adds floating-point values [batch, tokens, hidden size]; shapes are added too, as integers."""
    if node.get_type_name() != "Add" or not node.get_output_element_type(0).is_real():
        return False
    rank = node.get_output_partial_shape(0).rank
    return bool(rank.is_dynamic or rank.get_length() == _RANK)
