"""Nodes of an IR that several passes make: integers, lengths, cuts and the mask of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError

__all__ = ["TOKENS", "cut", "integers", "length", "model_input", "valid_tokens"]

TOKENS = 1  # axis of the tokens, in [batch, tokens, width]
_END = np.iinfo(np.int64).max


def integers(values: int | Sequence[int]) -> Any:
    """A constant of integers."""
    from openvino import opset13 as ops

    return ops.constant(values, dtype=np.int64)


def model_input(model: Any, name: str) -> Any | None:
    """An input of a model by its name; None if there is none."""
    return next((p for p in model.inputs if name in p.get_names()), None)


def length(value: Any, axis: int = TOKENS) -> Any:
    """One dimension [1] of a value."""
    from openvino import opset13 as ops

    return ops.gather(ops.shape_of(value), integers([axis]), integers(0))


def cut(value: Any, start: Any, end: Any = _END, axis: int = TOKENS) -> Any:
    """A value from `start` up to `end` along an axis; each is a number or a value [1]."""
    from openvino import opset13 as ops

    bounds = [integers([at]) if isinstance(at, int) else at for at in (start, end)]
    return ops.slice(value, *bounds, integers([1]), integers([axis]))


def valid_tokens(model: Any, layer: int, name: str) -> Any:
    """1 for a token of a step, 0 for padding, as floats [batch, tokens].

    Raises:
        RefusalError: the model has no mask of the tokens.
    """
    from openvino import opset13 as ops

    mask, ids = model_input(model, "attention_mask"), model_input(model, "input_ids")
    if mask is None or ids is None:
        raise RefusalError(layer, "it has no attention_mask, which a layer with a state needs")
    return ops.convert(cut(mask, ops.negative(length(ids))), "f32", name=name)
