"""What a GGUF file holds: keys and tensors. Tensors are read when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Content", "Key", "Tensor", "recoded", "tensor_of"]


@dataclass(frozen=True)
class Key:
    """A value with its GGUF type; `of` is the type of an array's elements."""

    value: Any
    kind: Any
    of: Any = None

    @classmethod
    def number(cls, value: int) -> Key:
        """An unsigned 32-bit number."""
        from gguf import GGUFValueType

        return cls(value, GGUFValueType.UINT32)

    @classmethod
    def real(cls, value: float) -> Key:
        """A 32-bit floating-point number."""
        from gguf import GGUFValueType

        return cls(value, GGUFValueType.FLOAT32)

    @classmethod
    def text(cls, value: str) -> Key:
        """A text."""
        from gguf import GGUFValueType

        return cls(value, GGUFValueType.STRING)

    @classmethod
    def flag(cls, value: bool) -> Key:
        """A truth value."""
        from gguf import GGUFValueType

        return cls(value, GGUFValueType.BOOL)

    @classmethod
    def numbers(cls, values: Sequence[int]) -> Key:
        """An array of signed 32-bit numbers."""
        from gguf import GGUFValueType

        return cls(list(values), GGUFValueType.ARRAY, GGUFValueType.INT32)

    @classmethod
    def texts(cls, values: Sequence[str]) -> Key:
        """An array of texts."""
        from gguf import GGUFValueType

        return cls(list(values), GGUFValueType.ARRAY, GGUFValueType.STRING)


@dataclass(frozen=True)
class Tensor:
    """A tensor in its stored form.

    Attributes:
        shape: of the elements, outermost dimension first: [outputs, inputs].
        kind: a `gguf.GGMLQuantizationType`.
        read: gives the stored array: float32, float16, or bytes [..., bytes of a row].
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    read: Callable[[], np.ndarray]

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file, padding left out."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * int(size)

    def values(self) -> np.ndarray:
        """The elements in float32, in `shape`."""
        from gguf import quants

        return np.asarray(quants.dequantize(self.read(), self.kind), np.float32).reshape(self.shape)


@dataclass(frozen=True)
class Content:
    """A GGUF file: architecture, the keys beside it, and tensors in their order."""

    architecture: str
    keys: Mapping[str, Key]
    tensors: tuple[Tensor, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """Value of a key of the architecture, by its name without the prefix."""
        found = self.keys.get(f"{self.architecture}.{name}")
        return default if found is None else found.value

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.get("block_count"))

    @property
    def by_name(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {tensor.name: tensor for tensor in self.tensors}


def tensor_of(name: str, values: np.ndarray, kind: Any) -> Tensor:
    """A tensor that stores float32 values in a type."""
    from gguf import quants

    return Tensor(name, values.shape, kind, lambda: quants.quantize(np.ascontiguousarray(values, np.float32), kind))


def recoded(tensor: Tensor, kind: Any) -> Tensor:
    """The tensor in another type; the same tensor if it has this type."""
    from gguf import quants

    if tensor.kind == kind:
        return tensor
    return Tensor(tensor.name, tensor.shape, kind, lambda: quants.quantize(tensor.values(), kind))
