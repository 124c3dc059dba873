"""Encodes values for another process as JSON and tensors. What arrives is data from any sender; pickle would be code.

    {"windows": tensor, "done": 3}   ->   [["windows", {"tensor": 0}], ["done", 3]] as a "pairs", and [tensor]

Lists and tuples arrive as lists, a dataclass as the dictionary of its fields; keys are text or whole numbers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["pack", "unpack"]


def pack(value: Any) -> tuple[str, list[torch.Tensor]]:
    """JSON text, and the tensors that the text refers to by number.

    Raises:
        TypeError: a value is neither JSON's, nor a tensor, an array or a dataclass.
    """
    tensors: list[torch.Tensor] = []
    return json.dumps(_packed(value, tensors)), tensors


def _packed(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        tensors.append((value if isinstance(value, torch.Tensor) else torch.from_numpy(value)).detach())
        return {kind: len(tensors) - 1}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError("a key is neither text nor a whole number")
        return {"pairs": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def unpack(text: str, tensors: Sequence[torch.Tensor]) -> Any:
    """The value that `pack` encoded."""
    return _unpacked(json.loads(text), tensors)


def _unpacked(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "pairs" in value:
        return {key: _unpacked(item, tensors) for key, item in value["pairs"]}
    return tensors[value["tensor"]] if "tensor" in value else tensors[value["array"]].numpy()
