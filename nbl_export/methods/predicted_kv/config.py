"""What all maps of an exit layer have in common, as nbl.json and config.json of an NBL checkpoint state it.

    "nbl_exit": {"layer": 20, "recent_tokens": 64, "epsilon": 1e-05}

The facts are those of `methods.predicted_kv.maps`. The stored weights of a map give its numbers, and the model its
shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of
from nbl_export.records.decoder import MOST_POSITIONS
from nbl_export.records.from_json import read_record, require

__all__ = ["StatedExit", "check_stated", "facts_of", "read_stated"]


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


def facts_of(maps: Mapping[int, PredictedKV]) -> dict[str, Any]:
    """The fields of `StatedExit` for the maps of a model."""
    mixer = exit_of(maps)
    return asdict(StatedExit(mixer.exit_layer, mixer.recent_tokens, mixer.epsilon))


def read_stated(value: Any) -> StatedExit:
    """The record of these fields.

    Raises:
        TypeError, ValueError: the value is no such record.
    """
    names = tuple(StatedExit.__dataclass_fields__)
    require(isinstance(value, Mapping) and set(value) == set(names), f"an exit layer has {', '.join(names)}")
    return read_record(StatedExit, value)


def check_stated(value: Any, layers: Sequence[int], count: int, positions: Any) -> None:
    """Check what a configuration states.

    Args:
        value: of `nbl_exit`. layers: of the maps. count: of the model's layers.
        positions: most tokens of a sequence, if it is known.

    Raises:
        ValueError: the value is no exit layer of these layers; the message has the value.
    """
    try:
        found = read_stated(value)
        most = min(positions, MOST_POSITIONS) if type(positions) is int else MOST_POSITIONS
        require(1 <= found.layer < count, f"layer is 1 to {count - 1}")
        require(1 <= found.recent_tokens < most, f"recent_tokens is 1 to {most - 1}")
        require(0 < found.epsilon < 1, "epsilon is between 0 and 1")
        require(min(layers) >= found.layer, f"keys of layer {min(layers)} are predicted below it")
        above = [layer for layer in range(found.layer, count) if layer not in layers]
        require(not above, f"layer {above[:1]} above it is not replaced")
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has nbl_exit {value}, which is no exit layer: {error}") from error
