"""What a GGUF file holds: keys and tensors. Reads a file, and writes one; tensors are read when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.trust.model_settings import check_layers

__all__ = ["Content", "Key", "Tensor", "read_content", "recoded", "tensor_of", "write_content"]


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


def read_content(path: Path) -> Content:
    """Keys and tensors of a file. Tensors stay mapped from the file.

    Raises:
        NblError: the file is one part of several, or states more layers than its tensors have.
        CorruptError: the file is no GGUF or is cut short.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = dict(reader.fields)
        architecture = str(fields.pop("general.architecture").contents())
        keys = {name: _key(field) for name, field in fields.items() if not name.startswith("GGUF.")}
        tensors = tuple(_tensor(found) for found in reader.tensors)
    except Exception as error:  # the reader raises whatever a damaged byte leads to
        raise CorruptError(f"{path} cannot be read as GGUF ({error}); fetch it again") from error
    if (parts := keys.get("split.count")) is not None and int(parts.value) > 1:
        raise NblError(f"{path} is one of {parts.value} parts; put them together (llama-gguf-split --merge)")
    content = Content(architecture, keys, tensors)
    check_layers(content.get("block_count"), content.by_name, path)
    return content


def _key(field: Any) -> Key:
    import gguf

    kind = field.types[0]
    return Key(field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)


def _tensor(found: Any) -> Tensor:
    data: np.ndarray = found.data
    return Tensor(found.name, tuple(int(n) for n in reversed(found.shape)), found.tensor_type, lambda: data)


def write_content(content: Content, path: Path) -> None:
    """Write a file; one tensor at a time is in memory."""
    import gguf

    writer = gguf.GGUFWriter(path, content.architecture)
    for name, key in content.keys.items():
        writer.add_key_value(name, key.value, key.kind, key.of)
    for tensor in content.tensors:
        shape, dtype = _stored_form(tensor)
        writer.add_tensor_info(tensor.name, shape, dtype, tensor.stored_bytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in content.tensors:
            writer.write_tensor_data(tensor.read())
    finally:
        writer.close()


def _stored_form(tensor: Tensor) -> tuple[tuple[int, ...], Any]:
    """Shape and type that the writer is told: elements of numbers, or bytes of rows."""
    import gguf

    if tensor.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        return tensor.shape, np.float32 if tensor.kind == gguf.GGMLQuantizationType.F32 else np.float16
    return gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind), np.uint8
