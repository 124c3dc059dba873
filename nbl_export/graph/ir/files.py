"""Reads and writes an IR: an XML file with the graph, and a file with its constants.

Two graphs of one model share a file of constants: the shipped one, and the one with the logits of all tokens.

The matrix of a product that an IR stores in codes or in 16 bits, with the values that the product multiplies by.

Constant (u8, i8, u4, i4, f16) ── Convert ── Subtract (zero points) ── Multiply (scales) ── Reshape ── Convert ── MatMul
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, MissingPackageError
from nbl_export.files import read_small
from nbl_export.graph.names import IR_FILE, IR_WEIGHTS
from nbl_export.records.quantised import Blocks

__all__ = [
    "GROUP_OPTION",
    "check_ir",
    "constants_of",
    "copy_options",
    "difference",
    "float_constant",
    "group_of",
    "ordered",
    "precision_of",
    "raw_bytes",
    "read_ir",
    "save_ir",
    "share_constants",
    "stored_matrix",
]

# No part can match where another one does: the text is a stranger's.
_DATA = re.compile(r"<data\b[^<>]*>")
_OFFSET, _SIZE = (re.compile(rf'(?<=\s{name}=")\d{{1,18}}(?=")') for name in ("offset", "size"))
_MOST_BYTES = 1 << 26  # of a graph file
GROUP_OPTION = "DYNAMIC_QUANTIZATION_GROUP_SIZE"  # of the plugin: activations of a group that share a scale
_ACTIVATIONS = 128
_INFO = "nbl_export"  # section of the graph's runtime information


def read_ir(directory: Path, file: str = IR_FILE) -> Any:
    """The model of a graph file of a directory; its constants stay in their file, mapped into memory.

    Raises:
        CorruptError: a file is missing, cut, or no IR.
        MissingPackageError: openvino is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("openvino", "openvino", "reading an IR") from error
    check_ir(directory, file)
    try:
        return openvino.Core().read_model(str(directory / file), str(directory / IR_WEIGHTS))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise CorruptError(f"OpenVINO cannot read {directory / file}: {reason}; export it again") from error


def check_ir(directory: Path, file: str = IR_FILE) -> None:
    """Check that a graph file and its constants are there and complete, without OpenVINO.

    Raises:
        CorruptError: a file is missing, empty or too short.
    """
    graph = directory / file
    weights = directory / IR_WEIGHTS
    for path in (graph, weights):
        if not path.is_file():
            raise CorruptError(f"{path} is missing; fetch or export the directory again")
    try:
        text = _text(graph)
    except (OSError, ValueError) as error:
        raise CorruptError(f"{graph} cannot be read ({error}); export it again") from error
    if "<net" not in text[:1000]:
        raise CorruptError(f"{graph} is not an OpenVINO graph; export it again")
    needed = max((offset + size for offset, size in _places(text)), default=0)
    if weights.stat().st_size < needed:
        raise CorruptError(
            f"{weights} is cut: it has {weights.stat().st_size:,} bytes and the graph reads {needed:,}; fetch it again"
        )


def save_ir(model: Any, directory: Path, precision: str, group: int = 0) -> None:
    """Write a model to a directory, with its precision and the size of its groups of int4 codes.

    A model without codes keeps its keys and values in 16 bits in OpenVINO GenAI too, as
    optimum-intel asks for. A model in codes names the size of the groups in which the CPU plugin rounds activations to
    8 bits: the plugin's own choice of 32 reads prompts more slowly (bench/EXPERIMENTS.md). A size that does not divide
    the groups of the codes leaves activations in float, which is slower still.
    """
    import openvino

    model.set_rt_info(precision, [_INFO, "precision"])
    model.set_rt_info(str(group), [_INFO, "group_size"])
    if precision == "fp16":
        model.set_rt_info("f16", ["runtime_options", "KV_CACHE_PRECISION"])
    if precision in ("int8", "int4"):
        model.set_rt_info(str(min(_ACTIVATIONS, group or _ACTIVATIONS)), ["runtime_options", GROUP_OPTION])
    openvino.save_model(model, str(directory / IR_FILE), compress_to_fp16=False)


def copy_options(model: Any, other: Any) -> None:
    """Give another model the options of the plugin that a model names."""
    for name in ("KV_CACHE_PRECISION", GROUP_OPTION):
        path = ["runtime_options", name]
        if model.has_rt_info(path):
            other.set_rt_info(model.get_rt_info(path).value, path)


def precision_of(model: Any) -> str:
    """The precision that `save_ir` has noted; "" for a model from elsewhere."""
    path = [_INFO, "precision"]
    return str(model.get_rt_info(path).value) if model.has_rt_info(path) else ""


def group_of(model: Any) -> int:
    """The size of the groups of int4 codes that `save_ir` has noted; 0 if there are none."""
    path = [_INFO, "group_size"]
    return int(str(model.get_rt_info(path).value)) if model.has_rt_info(path) else 0


def share_constants(graph: Path, weights: Path, others: tuple[Path, Path]) -> str:
    """The text of a graph whose constants are taken from another graph's file.

    Args:
        graph, weights: the graph, and the file that it reads now.
        others: a graph that has the same constants and more, and its file.

    Raises:
        CorruptError: the other graph lacks a constant.
    """
    places = {digest: place for place, digest in _constants(*others)}
    moved = dict(_constants(graph, weights))

    def place_of(match: re.Match[str]) -> str:
        old = next(_places(match[0]), None)
        if old is None:
            return match[0]
        if moved[old] not in places:
            raise CorruptError(f"{others[1]} lacks the constant of {old[1]} bytes at {old[0]} of {weights}")
        return _OFFSET.sub(str(places[moved[old]][0]), match[0], count=1)

    return _DATA.sub(place_of, _text(graph))


def _text(graph: Path) -> str:
    return read_small(graph, _MOST_BYTES).decode("utf-8")


def _places(text: str) -> Iterator[tuple[int, int]]:
    """Offset and size of each constant in the text of a graph."""
    for tag in _DATA.findall(text):
        offset = _OFFSET.search(tag)
        size = _SIZE.search(tag)
        if offset and size:
            yield int(offset[0]), int(size[0])


def _constants(graph: Path, weights: Path) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Offset and size of each constant, and the hash of its bytes."""
    places = set(_places(_text(graph)))
    with weights.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        view = memoryview(data)
        try:
            for offset, size in sorted(places):
                yield (offset, size), hashlib.sha256(view[offset : offset + size]).digest() + size.to_bytes(8, "little")
        finally:
            view.release()


def difference(one: Any, other: Any) -> str:
    """How two models differ; "" if nodes, wiring, attributes and constants are equal. Names do not matter."""
    ours = ordered(one)
    theirs = ordered(other)
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


_INDICES = ("i64", "i32", "boolean")
_MOVES = ("Convert", "Reshape")
_CODES = ("u8", "i8", "u4", "i4")


def stored_matrix(product: Any) -> Blocks | None:
    """The matrix W [N, K] of a product x W', as it is stored: in codes or in 16 bits; None if it is float32.

    A matrix of 16-bit floats has a block for each element, whose scale is the last of its 11 bits.

    Raises:
        CorruptError: the matrix is stored in another layout.
    """
    node = product.input_value(1).get_node()
    zeros = np.zeros(1, np.float32)
    scales = None
    while (step := node.get_type_name()) in (*_MOVES, "Subtract", "Multiply"):
        if step == "Subtract":
            zeros = _values(_bare(node.input_value(1)))
        elif step == "Multiply":
            scales = float_constant(_bare(node.input_value(1)))
        node = node.input_value(0).get_node()
    kind = _type(node)
    if step == "Constant" and kind == "f32":
        return None
    if step == "Constant" and kind == "f16":
        matrix = _values(node)
        _, exponents = np.frexp(matrix)
        units = np.ldexp(np.float32(1), np.maximum(exponents, -13) - 11).astype(np.float32)
        return Blocks(matrix / units, units, 1)
    if step != "Constant" or kind not in _CODES or scales is None:
        raise CorruptError(f"the IR stores {node.get_friendly_name()} as {kind}, which is not known here")
    rows = node.get_output_shape(0)[0]
    codes = (_values(node) - zeros).reshape(rows, -1)
    steps = scales.reshape(rows, -1)
    return Blocks(codes, steps, codes.shape[1] // steps.shape[1])


def constants_of(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and bytes of each constant with more than one element, apart from shapes and indices."""
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or _type(node) in _INDICES:
            continue
        if np.prod(node.get_output_shape(0)) > 1:
            yield node.get_friendly_name(), raw_bytes(node)


def float_constant(node: Any) -> np.ndarray:
    """Values of a floating-point constant, in float32."""
    return np.asarray(node.get_data(), np.float32)


def _type(node: Any) -> str:
    return str(node.get_output_element_type(0).to_string())


def raw_bytes(node: Any) -> np.ndarray:
    """Bytes of a constant; two codes of 4 bits share a byte."""
    return np.atleast_1d(np.asarray(node.data)).reshape(-1).view(np.uint8)


def _bare(value: Any) -> Any:
    """The node behind moves."""
    node = value.get_node()
    while node.get_type_name() in _MOVES:
        node = node.input_value(0).get_node()
    return node


def _values(node: Any) -> np.ndarray:
    """Values of a constant, or its codes, as float32 in the constant's shape."""
    kind = _type(node)
    shape = list(node.get_output_shape(0))
    if kind not in ("u4", "i4"):
        return np.asarray(node.get_data(), np.float32).reshape(shape)
    packed = np.asarray(node.data).view(np.uint8).reshape(-1)
    flat = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: int(np.prod(shape))].astype(np.float32)
    return np.where(flat > 7, flat - 16, flat).reshape(shape) if kind == "i4" else flat.reshape(shape)
