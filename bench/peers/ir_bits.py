"""Bits that an OpenVINO IR spends on a weight of the matrices it multiplies with."""

from __future__ import annotations

from typing import Any

__all__ = ["bits_of_ir"]


def bits_of_ir(model: Any) -> tuple[int, float]:
    """Nominal bits of most weights that a MatMul reads, and bits for each with scales and zero points."""
    total, elements = 0, 0
    seen: dict[int, int] = {}
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constants = _constants(node.input_value(1).get_node())
        if not constants:
            continue
        sizes = [c.get_element_type().size * 8 if c.get_element_type().bitwidth == 0 else c.get_element_type().bitwidth
                 for c in constants]  # fmt: skip
        counts = [_count(c.get_output_shape(0)) for c in constants]
        count = max(counts)
        bits = sizes[counts.index(count)]
        total += sum(s * n for s, n in zip(sizes, counts, strict=True))
        elements += count
        seen[bits] = seen.get(bits, 0) + count
    return max(seen, key=lambda bits: seen[bits]), total / elements


def _constants(node: Any) -> list[Any]:
    """The constants that a value is computed from; none where anything else is."""
    if node.get_type_name() == "Constant":
        return [node]
    if node.get_type_name() not in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        return []
    parts = [_constants(value.get_node()) for value in node.input_values()]
    return [c for part in parts for c in part] if all(parts) else []


def _count(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= int(size)
    return count
