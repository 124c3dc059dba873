"""Reads a GGUF file's content, and writes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.formats.gguf.content import Content, Key, Tensor
from nbl_export.trust.model_settings import check_layers

__all__ = ["read_content", "write_content"]


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
