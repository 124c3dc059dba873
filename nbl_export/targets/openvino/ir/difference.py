"""Compares two IRs node by node, constants included."""

from __future__ import annotations

from typing import Any

from nbl_export.targets.openvino.ir.matrices import raw_bytes

__all__ = ["difference", "ordered"]


def difference(one: Any, other: Any) -> str:
    """How two models differ; "" if nodes, wiring, attributes and constants are equal. Names do not matter."""
    ours, theirs = ordered(one), ordered(other)
    if len(ours) != len(theirs):
        return f"{len(ours)} nodes, not {len(theirs)}"
    places = [{node.get_name(): k for k, node in enumerate(nodes)} for nodes in (ours, theirs)]
    for a, b in zip(ours, theirs, strict=True):
        if _described(a, places[0]) != _described(b, places[1]):
            return f"node {a.get_friendly_name()} differs"
        if a.get_type_name() == "Constant" and not _same(a, b):
            return f"constant {a.get_friendly_name()} differs"
    return ""


def ordered(model: Any) -> list[Any]:
    """All nodes, each behind its inputs; the order follows from outputs and states alone."""
    sinks = sorted(model.get_sinks(), key=lambda node: str(node.get_attributes()["variable_id"]))
    found: dict[str, Any] = {}
    waiting = [*sinks[::-1], *reversed(model.get_results())]
    while waiting:
        node = waiting[-1]
        inputs = [value.get_node() for value in node.input_values()]
        missing = [n for n in inputs if n.get_name() not in found]
        if missing:
            waiting += reversed(missing)
            continue
        found.setdefault(node.get_name(), node)
        waiting.pop()
    return list(found.values())


def _described(node: Any, places: dict[str, int]) -> tuple[Any, ...]:
    """Kind, attributes and inputs of a node."""
    inputs = [(places[value.get_node().get_name()], value.get_index()) for value in node.input_values()]
    attributes = {} if node.get_type_name() == "Constant" else node.get_attributes()
    kinds = [(p.get_element_type().to_string(), str(p.get_partial_shape())) for p in node.outputs()]
    return node.get_type_name(), sorted(map(str, attributes.items())), inputs, kinds


def _same(one: Any, other: Any) -> bool:
    return raw_bytes(one).tobytes() == raw_bytes(other).tobytes()
