"""The cut that config.json of an NBL checkpoint states, beside the layers that it replaces and their kinds.

    "nbl_cut": {"layer": 20, "near": 64, "epsilon": 1e-05}

The facts are those of `mixers.predicted`. The stored weights of a map give its numbers, and the model its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.mixers.base import Mixer
from nbl_export.mixers.cut import cut_of
from nbl_export.mixers.predicted import Predicted
from nbl_export.records.decoder import MOST_POSITIONS
from nbl_export.records.from_json import read_record, require
from nbl_export.records.plan import CUT_KIND

__all__ = ["StatedCut", "facts_of", "stated_cut"]


@dataclass(frozen=True)
class StatedCut:
    """What all maps of a cut have in common.

    Attributes:
        layer: its input is the stream that the maps read.
        near: W, the tokens at the end of a step that climb, beside the first one.
        epsilon: of the norm.
    """

    layer: int
    near: int
    epsilon: float

    def like(self, size: int, keys: int) -> Predicted:
        """A map of this cut without numbers, for `Kind.blank`; `size` is D, `keys` is K."""
        weight = np.broadcast_to(np.float32(0), (2 * keys, 2 * size))  # takes no memory
        return Predicted(weight, weight[:, 0], size, self.layer, self.near, self.epsilon)


def facts_of(maps: Mapping[int, Mixer]) -> dict[str, Any] | None:
    """The value of `nbl_cut` for the maps of a model; None if none of them predicts keys."""
    if (cut := cut_of(maps)) is None:
        return None
    return {"layer": cut.layer, "near": cut.near, "epsilon": next(iter(cut.maps.values())).epsilon}


def stated_cut(value: Any, kinds: Mapping[int, str], layers: int, positions: Any) -> StatedCut | None:
    """The cut of a configuration; None if no layer's keys are predicted.

    Args:
        value: of `nbl_cut`.
        kinds: of the replaced layers. layers: their number in the model.
        positions: most tokens of a sequence, if it is known.

    Raises:
        ValueError: the value is no cut of these layers; the message has the value.
    """
    predicted = [layer for layer, kind in kinds.items() if kind == CUT_KIND]
    if value is None and not predicted:
        return None
    try:
        cut = _read(value)
        most = min(positions, MOST_POSITIONS) if type(positions) is int else MOST_POSITIONS
        require(1 <= cut.layer < layers, f"layer is 1 to {layers - 1}")
        require(1 <= cut.near < most, f"near is 1 to {most - 1}")
        require(0 < cut.epsilon < 1, "epsilon is between 0 and 1")
        require(bool(predicted), "no layer is of the kind predicted")
        require(min(predicted) >= cut.layer, f"keys of layer {min(predicted)} are predicted below it")
        above = [layer for layer in range(cut.layer, layers) if layer not in kinds]
        require(not above, f"layer {above[:1]} above it is not replaced")
    except (TypeError, ValueError) as error:
        raise ValueError(f"config.json has nbl_cut {value}, which is no cut: {error}") from error
    return cut


def _read(value: Any) -> StatedCut:
    names = tuple(StatedCut.__dataclass_fields__)
    require(isinstance(value, Mapping) and set(value) == set(names), f"a cut has {', '.join(names)}")
    return read_record(StatedCut, value)
