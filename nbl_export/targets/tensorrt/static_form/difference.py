"""Compares two graphs exactly and gives the first difference.

A CPU cannot run bf16 and runs fp16 and int4 inexactly. So such a graph is verified through its float32 twin, a float32
copy of the same graph. The numbers of the twin are compared with those of torch. The deployed graph is compared with
the twin after the precision passes: node for node and weight for weight, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["first_difference"]


def first_difference(one: ir.Model, other: ir.Model) -> str:
    """The first difference of two graphs (inputs, outputs, nodes in order, initializers); "" if there is none."""
    pairs: list[tuple[str, list[Any], list[Any]]] = [
        ("input", [_signature(v) for v in one.graph.inputs], [_signature(v) for v in other.graph.inputs]),
        ("output", [_signature(v) for v in one.graph.outputs], [_signature(v) for v in other.graph.outputs]),
        ("node", [_node(n) for n in one.graph], [_node(n) for n in other.graph]),
        ("initializer", sorted(one.graph.initializers), sorted(other.graph.initializers)),
    ]
    for what, ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=False):
            if a != b:
                return f"{what} {_short(a)} against {_short(b)}"
        if len(ours) != len(theirs):
            return f"{len(ours)} {what}s against {len(theirs)}"
    for name, value in one.graph.initializers.items():
        if not _equal(value.const_value, other.graph.initializers[name].const_value):
            return f"initializer {name} has other numbers"
    return ""


def _signature(value: ir.Value) -> tuple[Any, ...]:
    dims = () if value.shape is None else tuple(d if isinstance(d, int) else str(d.value) for d in value.shape)
    return value.name, str(value.dtype), dims


def _node(node: ir.Node) -> tuple[Any, ...]:
    attributes = sorted((k, _plain(a.value)) for k, a in node.attributes.items())
    names = ([v.name if v is not None else None for v in values] for values in (node.inputs, node.outputs))
    return node.op_type, node.domain, *names, attributes


def _plain(value: Any) -> str:
    """An attribute as text; floats in single precision, as files keep them."""
    return str(float(np.float32(value))) if isinstance(value, float) else str(value)


def _equal(one: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    if one is None or other is None:
        return one is other
    if one.dtype != other.dtype or one.shape.numpy() != other.shape.numpy():
        return False
    a, b = (np.ascontiguousarray(t.numpy()) for t in (one, other))
    return bool(np.array_equal(a.view(np.uint8), b.view(np.uint8)))


def _short(thing: Any) -> str:
    text = " ".join(map(str, thing)) if isinstance(thing, tuple) else str(thing)
    return text if len(text) <= 120 else f"{text[:120]}..."
