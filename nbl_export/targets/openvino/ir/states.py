"""The key/value states of a stateful IR, and their layers.

    ReadValue(key i) -- Gather(beam_idx) -- Concat(new keys) -- attention
                                              `-- Assign(key i)

A decoder has two states a layer. The layer is a number in the states' names, which every exporter writes, and the order
of the graph confirms it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import RefusalError

__all__ = ["LayerStates", "State", "states_of", "variable_of"]

_NUMBER = re.compile(r"\d+")
_VALUE = re.compile(r"value|(?<![a-z])v(?![a-z])")  # behind the number of the layer


@dataclass(frozen=True)
class State:
    """A state: the name of its variable, and the nodes that read and assign it."""

    variable: str
    read: Any
    assign: Any

    @property
    def heads(self) -> int:
        """Key/value heads, from the state's shape [batch, heads, tokens, head size]."""
        return int(self.read.get_output_partial_shape(0)[1].get_length())

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return int(self.read.get_output_partial_shape(0)[3].get_length())


@dataclass(frozen=True)
class LayerStates:
    """The two states of a layer."""

    key: State
    value: State

    def __iter__(self) -> Any:
        return iter((self.key, self.value))


def variable_of(node: Any) -> str:
    """The variable of a ReadValue or Assign node."""
    return str(node.get_attributes()["variable_id"])


def states_of(model: Any) -> Mapping[int, LayerStates]:
    """States by layer, ascending.

    Raises:
        RefusalError: the model has no states, or a layer does not have a key and a value.
    """
    reads = {variable_of(op): op for op in model.get_ops() if op.get_type_name() == "ReadValue"}
    assigns = {variable_of(op): op for op in model.get_sinks()}
    if not reads:
        raise RefusalError(
            None, "it has no states; export it with the key/value cache inside (optimum-cli: text-generation-with-past)"
        )
    layers: dict[int, dict[bool, State]] = {}
    for name, read in reads.items():
        number = _NUMBER.search(name)
        if number is None or name not in assigns:
            raise RefusalError(None, f"its state {name} is not a key/value cache of a layer")
        is_value = bool(_VALUE.search(name[number.end() :].partition("present")[0]))
        layers.setdefault(int(number.group()), {})[is_value] = State(name, read, assigns[name])
    for layer, pair in layers.items():
        if set(pair) != {False, True}:
            raise RefusalError(layer, "it does not have one key state and one value state")
    return {layer: LayerStates(pair[False], pair[True]) for layer, pair in sorted(layers.items())}
