"""A third method, in one folder: skipped tokens get the layer's own products on the stream at the exit layer.

    stream c, all tokens of a step --- norm, k_proj and v_proj of layer l --- keys, values of skipped tokens of layer l

POP (arXiv 2602.03295) does so. Nothing is fitted to the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbl_export.methods.base import ChoiceInputs, Stored
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.method import PredictedKVMethod
from nbl_export.methods.predicted_kv.sums import own_map

__all__ = ["POP", "OwnProducts"]


@dataclass(frozen=True)
class OwnProducts(PredictedKV):
    """The products of a layer, as a map."""

    kind = "pop"


class _Pop(PredictedKVMethod):
    name = "pop"
    title = "own products"

    def fit(self, inputs: ChoiceInputs, exit_layer: int) -> dict[int, PredictedKV]:
        model = inputs.model.value
        return {layer: self.of(own_map(model, layer, exit_layer, 1)) for layer in range(exit_layer, inputs.num_layers)}

    def of(self, given: PredictedKV) -> OwnProducts:
        return OwnProducts(**vars(given))

    def from_tensors(self, tensors: Stored) -> Any:
        found: Any = super().from_tensors(tensors)
        return self.of(found)


POP = _Pop()
