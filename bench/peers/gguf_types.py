"""GGUF files of other weight types, and the bits that one spends on a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["TYPES", "bits_of_gguf", "requantize"]

TYPES = ("f32", "f16", "q8_0", "q4_0")
_NOMINAL = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8, "Q6_K": 6, "Q5_K": 5, "Q5_0": 5, "Q5_1": 5,
            "Q4_K": 4, "Q4_0": 4, "Q4_1": 4, "Q3_K": 3, "Q2_K": 2}  # fmt: skip


def bits_of_gguf(path: Path) -> tuple[int, float]:
    """Nominal bits of most weights, and bits for each with scales; an embedding is one of the matrices (often tied)."""
    import gguf

    total, elements = 0, 0
    seen: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) < 2:
            continue
        count, name = int(tensor.n_elements), tensor.tensor_type.name
        total, elements = total + 8 * int(tensor.n_bytes), elements + count
        seen[name] = seen.get(name, 0) + count
    most = max(seen, key=lambda name: seen[name])
    return _NOMINAL.get(most, round(total / elements)), total / elements


def requantize(source: Path, out: Path, weight_type: str) -> None:
    """Write a GGUF with all matrices in one type, everything else as it was; no importance matrix, no mix of types.

    Values are those of the source: from a Q4_1 file an F32 one holds the rounded weights, exactly.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[weight_type.upper()]
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            writer.add_key_value(name, field.contents(), field.types[0], _element(field))
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32"}.get(kind.name, f"MOSTLY_{kind.name}")])
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        target = kind if len(tensor.shape) > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, target), raw_dtype=target)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _element(field: Any) -> Any:
    import gguf

    return field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
