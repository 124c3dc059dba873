"""The exit layer that config.json of an NBL checkpoint states, beside the layers that it replaces and their kinds.

    "nbl_exit": {"layer": 20, "recent_tokens": 64, "epsilon": 1e-05}

The facts are those of `methods.predicted_kv.maps`. The stored weights of a map give its numbers, and the model its
shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.methods.base import Mixer
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.prompt_exit import prompt_exit_of
from nbl_export.records.decoder import MOST_POSITIONS
from nbl_export.records.from_json import read_record, require
from nbl_export.records.plan import PREDICTED_KV

__all__ = ["StatedExit", "exit_from_config", "facts_of"]


@dataclass(frozen=True)
class StatedExit:
    """What all maps of an exit layer have in common.

    Attributes:
        layer: its input is the stream that the maps read.
        recent_tokens: W, the tokens at the end of a step that continue, beside the first one.
        epsilon: of the norm.
    """

    layer: int
    recent_tokens: int
    epsilon: float

    def like(self, size: int, keys: int) -> PredictedKV:
        """A map of this exit layer without numbers, for `Kind.blank`; `size` is D, `keys` is K."""
        weight = np.broadcast_to(np.float32(0), (2 * keys, 2 * size))  # takes no memory
        return PredictedKV(weight, weight[:, 0], size, self.layer, self.recent_tokens, self.epsilon)


def facts_of(maps: Mapping[int, Mixer]) -> dict[str, Any] | None:
    """The value of `nbl_exit` for the maps of a model; None if none of them predicts KV."""
    if (prompt_exit := prompt_exit_of(maps)) is None:
        return None
    return {
        "layer": prompt_exit.layer,
        "recent_tokens": prompt_exit.recent_tokens,
        "epsilon": next(iter(prompt_exit.maps.values())).epsilon,
    }


def exit_from_config(value: Any, kinds: Mapping[int, str], layers: int, positions: Any) -> StatedExit | None:
    """The exit layer of a configuration; None if no layer's keys are predicted.

    Args:
        value: of `nbl_exit`.
        kinds: of the replaced layers. layers: their number in the model.
        positions: most tokens of a sequence, if it is known.

    Raises:
        ValueError: the value is no exit layer of these layers; the message has the value.
    """
    predicted = [layer for layer, kind in kinds.items() if kind == PREDICTED_KV]
    if value is None and not predicted:
        return None
    try:
        prompt_exit = _read(value)
        most = min(positions, MOST_POSITIONS) if type(positions) is int else MOST_POSITIONS
        require(1 <= prompt_exit.layer < layers, f"layer is 1 to {layers - 1}")
        require(1 <= prompt_exit.recent_tokens < most, f"recent_tokens is 1 to {most - 1}")
        require(0 < prompt_exit.epsilon < 1, "epsilon is between 0 and 1")
        require(bool(predicted), "no layer is of the kind predicted")
        require(min(predicted) >= prompt_exit.layer, f"keys of layer {min(predicted)} are predicted below it")
        above = [layer for layer in range(prompt_exit.layer, layers) if layer not in kinds]
        require(not above, f"layer {above[:1]} above it is not replaced")
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has nbl_exit {value}, which is no exit layer: {error}") from error
    return prompt_exit


def _read(value: Any) -> StatedExit:
    names = tuple(StatedExit.__dataclass_fields__)
    require(isinstance(value, Mapping) and set(value) == set(names), f"an exit layer has {', '.join(names)}")
    return read_record(StatedExit, value)
