"""Finds the states and the attention block of each layer in a stateful IR, by the dataflow.

    ReadValue(key i) -- Gather(beam_idx) -- Concat(new keys) -- attention
                                              `-- Assign(key i)

    x ── norm ─┬─ q, k, v ── state ── attention ── product (o_proj) ── ... ── join (Add)
    │          normed                                                          │
    └──────────────────────── residual ────────────────────────────────────────┘

A decoder has two states a layer. The layer is a number in the states' names, which every exporter writes. The join is
the first addition behind the states whose other operand is an ancestor of the layer's keys: a mask, a bias and the
epsilon of a norm are not. So names of nodes do not matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, RefusalError
from nbl_export.files import read_json

__all__ = ["Block", "Dataflow", "Heads", "State", "context_length", "has_window", "states_of"]

_RANK = 3  # of the residual stream
_STATE = re.compile(r"past_key_values\.(\d{1,9})\.(key|value)")  # begins the name of a state


@dataclass(frozen=True)
class State:
    """A state: the name of its variable, and the nodes that read and assign it."""

    variable: str
    read: Any
    assign: Any

    @property
    def new(self) -> Any:
        """The rows [batch, heads, tokens, head size] that a step puts behind those of the state."""
        return self.assign.input_value(0).get_node().input_value(1)

    @property
    def heads(self) -> int:
        """Key/value heads, from the state's shape [batch, heads, tokens, head size]."""
        return int(self.read.get_output_partial_shape(0)[1].get_length())

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return int(self.read.get_output_partial_shape(0)[3].get_length())


def _variable(node: Any) -> str:
    """The variable of a ReadValue or Assign node."""
    return str(node.get_attributes()["variable_id"])


def states_of(model: Any) -> Mapping[int, tuple[State, State]]:
    """States of keys and of values by layer, ascending.

    Raises:
        RefusalError: the model has no states, or a layer does not have a key and a value.
    """
    reads = {_variable(op): op for op in model.get_ops() if op.get_type_name() == "ReadValue"}
    assigns = {_variable(op): op for op in model.get_sinks()}
    if not reads:
        raise RefusalError(
            None, "it has no states; export it with the key/value cache inside (optimum-cli: text-generation-with-past)"
        )
    layers: dict[int, dict[str, State]] = {}
    for name, read in reads.items():
        match = _STATE.match(name)
        if match is None or name not in assigns:
            raise RefusalError(None, f"its state {name} is not a key/value cache of a layer")
        layers.setdefault(int(match[1]), {})[match[2]] = State(name, read, assigns[name])
    for layer, pair in layers.items():
        if len(pair) != 2:
            raise RefusalError(layer, "it does not have one key state and one value state")
    return {layer: (pair["key"], pair["value"]) for layer, pair in sorted(layers.items())}


@dataclass(frozen=True)
class Block:
    """The attention block of a layer.

    Attributes:
        join: the addition of attention's output to the residual stream.
        branch: number of join's input that the output feeds.
        last: attention's last product (o_proj), in front of which one token can be taken, and the number of its input.
        normed: the value that the first products of the attention multiply; None if there are several, or if it is x.
    """

    layer: int
    join: Any
    branch: int
    last: tuple[Any, int]
    normed: Any | None

    @property
    def residual(self) -> Any:
        """Value x that join adds, the layer's input."""
        return self.join.input_value(1 - self.branch)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer.

    Attributes:
        queries, keys, values: inputs [B, T, heads x head size] of the nodes that split products into heads.
        attention: what attention gives [B, heads, T, head size].
    """

    queries: Any
    keys: Any
    values: Any
    attention: Any


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
        behind = self.below([state.read for state in states])
        earlier = self.above(states[0].assign)
        for node in self.nodes:
            if node.get_name() not in behind or not _adds_vectors(node):
                continue
            inside = [value.get_node().get_name() in behind for value in node.input_values()]
            if sum(inside) != 1:
                continue
            residual = node.input_value(inside.index(False))
            if residual.get_node().get_name() in earlier and not self.is_constant(residual):
                return self._described(layer, node, inside.index(True), behind)
        raise RefusalError(layer, "no addition joins its attention with the residual stream")

    def heads(self, block: Block) -> Heads:
        """Where the queries, keys and values of a layer are split into heads, and what attention makes of them.

        Raises:
            RefusalError: there is not one such node for each of them, or o_proj multiplies something else.
        """
        keys, values = (state.new for state in self.states[block.layer])
        behind = self.below([self.states[block.layer][0].read])
        attention = next(n for n in self._of_type("ScaledDotProductAttention") if n.get_name() in behind)
        inner = self.below([block.residual.get_node()])

        def split(value: Any) -> Any:
            above = self.above(value.get_node()) & inner
            found = [n.input(0) for n in self.nodes if n.get_name() in above and _splits(n)]
            if len(found) != 1:
                raise RefusalError(block.layer, f"{len(found)} nodes split its queries, keys or values into heads")
            return found[0]

        product, data = block.last
        node = product.input_value(data).get_node()
        while node.get_type_name() in ("Reshape", "Transpose"):
            node = node.input_value(0).get_node()
        if node.get_name() != attention.get_name():
            raise RefusalError(block.layer, f"{node.get_friendly_name()} stands between its attention and o_proj")
        return Heads(split(attention.input_value(0)), split(keys), split(values), attention.output(0))

    def shapes_of(self, stream: Any, layer: int) -> list[Any]:
        """Inputs of nodes that read the shape [B, T, D] of a layer's stream from a value in front of its attention.

        OpenVINO takes a number of tokens, for a mask too, from any value that has this number.
        """
        behind = self.below([state.read for state in self.states[layer]])
        inner = self.below([stream.get_node()]) - behind
        width = stream.get_partial_shape()[-1]
        found = [node.input(0) for node in self._of_type("ShapeOf") if node.get_name() in inner]
        return [port for port in found if port.get_partial_shape()[-1] == width]

    def head(self) -> Any:
        """The product that makes the logits."""
        result = next(n for n in self._of_type("Result") if "logits" in n.input_value(0).get_names())
        above = self.above(result)
        return [n for n in self._of_type("MatMul") if n.get_name() in above][-1]

    def _of_type(self, name: str) -> list[Any]:
        return [node for node in self.nodes if node.get_type_name() == name]

    def _described(self, layer: int, join: Any, branch: int, behind: set[str]) -> Block:
        residual = join.input_value(1 - branch)
        end = self._place[join.get_name()]
        start = self._place[residual.get_node().get_name()]
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
        return Block(layer, join, branch, last[0], normed)


def _splits(node: Any) -> bool:
    """Whether a node turns [batch, tokens, width] into [batch, tokens, heads, head size]."""
    if node.get_type_name() != "Reshape":
        return False
    ranks = (node.get_input_partial_shape(0).rank, node.get_output_partial_shape(0).rank)
    return all(rank.is_static for rank in ranks) and [r.get_length() for r in ranks] == [_RANK, _RANK + 1]


def _adds_vectors(node: Any) -> bool:
    """Whether a node adds floating-point values [batch, tokens, hidden size]; shapes are added too, as integers."""
    if node.get_type_name() != "Add" or not node.get_output_element_type(0).is_real():
        return False
    rank = node.get_output_partial_shape(0).rank
    return bool(rank.is_dynamic or rank.get_length() == _RANK)


def has_window(directory: Path) -> bool:
    """Whether config.json states a sliding window that the model uses; False without such a file."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):
        return False
    return bool(config.get("sliding_window")) and config.get("use_sliding_window") is not False


def context_length(directory: Path) -> int:
    """Positions of the model, from config.json.

    Raises:
        CorruptError: the file is missing or does not state them.
    """
    path = directory / "config.json"
    try:
        return int(read_json(path)["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptError(
            f"{path} does not state max_position_embeddings ({error}); export the directory again"
        ) from error
