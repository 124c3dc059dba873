"""Rung a of the ladder: the files are valid ONNX, the contract is as predicted, the maps are as fitted.

The maps are read from the graph, dequantised if necessary, and compared with maps.safetensors. Every other weight must
equal a weight of the original graph byte for byte. Quantisation noise can hide a lost bias or two exchanged maps from
logits alone; this check finds both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nbl_export.graph.check import check_structure, skeleton
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.records.decoder import DecoderSpec, GraphContract
from nbl_export.records.plan import AffineMap, layers_below
from nbl_export.records.results import RungResult
from nbl_export.rewrite.token_table import table_name

__all__ = ["check_file", "check_maps", "check_untouched"]

_OURS = re.compile(r"nbl\.layers\.[\d-]+\.")
_SHAPES = "nbl.block_sums."  # begins the names of shapes of block sums (`graph.coded.block_sums`)
_OUR_PRODUCT = re.compile(r"/nbl/layers\.\d+/MatMul(?!.*/offsets$)")
_PRODUCTS = {"weight": "MatMul", "down": "MatMulDown", "up": "MatMulUp"}  # as `rewrite.bypass` names them
_SPOKEN = {"last": "of the last token", "all": "of all tokens"}
# ONNX Runtime's symmetric quantiser spans [-8, 8) steps: the mirror image of a block's largest value is one step off.
_STEPS = 1.01
_HALF_STEP = 0.57  # half a step, and 127 / 2048 for the largest code times a scale rounded to 11 bits
_ROWS = 8192  # table rows compared at once


def check_file(
    subject: str,
    directory: Path,
    spec: DecoderSpec,
    kept: Sequence[int],
    session: GraphContract,
    itemsize: int,
    logits: str = "all",
) -> list[RungResult]:
    """Rung a: the file is valid ONNX; its inputs and outputs are those of the plan and of `logits` (last or all)."""
    proto = onnx.load(str(directory / GRAPH_FILE), load_external_data=False)
    bare = skeleton(proto)
    problem = check_structure(bare)
    if not problem:
        try:
            onnx.shape_inference.infer_shapes(bare, check_type=True, data_prop=True)
        except Exception as error:  # onnx raises several types
            problem = str(error).splitlines()[0]
    results = [_verdict("a", subject, "onnx checker and shape inference", not problem, problem)]
    in_file = ([v.name for v in proto.graph.input], [v.name for v in proto.graph.output])
    in_session = ([v.name for v in session.inputs], [v.name for v in session.outputs])
    wanted = {f"past_key_values.{i}.{p}" for i in kept for p in ("key", "value")}
    has = {n for n in in_file[0] if n.startswith("past_key_values.")}
    gives = {n.replace("present", "past_key_values") for n in in_file[1] if n.startswith("present.")}
    detail = f"caches {len(has) // 2} of {spec.num_layers} layers, logits {_SPOKEN[session.logits]}"
    kept_word = has == wanted == gives and in_file == in_session and session.logits == logits
    results.append(_verdict("a", subject, "contract", kept_word, detail))
    predicted = spec.cache_bytes_per_token(len(kept), itemsize)
    stated = session.cache_bytes_per_token(spec.head_dim)
    detail = f"{stated} bytes a token, {predicted} predicted"
    results.append(_verdict("a", subject, "cache bytes per token", stated == predicted, detail))
    return results


def check_maps(
    subject: str, directory: Path, maps: Mapping[int, AffineMap], rows_VD: np.ndarray | None = None
) -> list[RungResult]:
    """Check that the graph's maps are the fitted maps: exact if floating point, within a step if quantised.

    Args:
        rows_VD: output of the layers below the first kept layer for each token, if the graph looks it up in a table.
    """
    proto = onnx.load(str(directory / GRAPH_FILE), load_external_data=False)
    tensors = {t.name: t for t in proto.graph.initializer if _OURS.match(t.name)}
    if not maps:
        return [_verdict("a", subject, "maps in the graph", not tensors, "none planned")]
    found = [n for n in proto.graph.node if n.op_type in ("MatMul", "MatMulNBits") and _OUR_PRODUCT.match(n.name)]
    nodes = {n.name.partition("_Q")[0]: n for n in found}
    wide = {n.name: n for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    if rows_VD is not None:
        first = len(layers_below(maps))
        table = _table_problem(directory, tensors, first, rows_VD)
        if table:
            return [_verdict("a", subject, "maps in the graph", False, table)]
        maps = {i: affine for i, affine in maps.items() if i > first}
    wanted = {f"/nbl/layers.{i}/{_PRODUCTS[name]}" for i, m in maps.items() for name in m.matrices}
    problems = [_map_problem(directory, {**nodes, **wide}, tensors, *item) for item in sorted(maps.items())]
    surplus = sorted(nodes.keys() - wanted)
    detail = f"{len(maps)} map{'' if len(maps) == 1 else 's'} as fitted"
    detail += "" if rows_VD is None else f", a table for the first {first}"
    worst = next(filter(None, problems), f"{surplus[0]} is not of the plan" if surplus else "")
    return [_verdict("a", subject, "maps in the graph", not worst, worst or detail)]


def _table_problem(directory: Path, tensors: Mapping[str, Any], first: int, rows_VD: np.ndarray) -> str:
    """How the token table differs from the output of the layers below `first`; "" if it does not differ."""
    name = table_name(first)
    if name not in tensors:
        return f"there is no table {name}"
    table = _array(tensors[name], directory)
    scales = _array(tensors[f"{name}_scales"], directory) if f"{name}_scales" in tensors else None
    if table.shape != rows_VD.shape:
        return f"{name} is {list(table.shape)}, not {list(rows_VD.shape)}"
    noise = 1e-5 * np.abs(rows_VD).max()  # allows for differences between processors
    for start in range(0, len(rows_VD), _ROWS):
        here = slice(start, start + _ROWS)
        found, allowed = _rows_of(table[here], None if scales is None else scales[here])
        off = (np.abs(found - rows_VD[here]) > allowed + noise).any(1)
        if off.any():
            return f"token {start + int(off.argmax())} of {name} is not the output of its layers"
    return ""


def _rows_of(table_ND: np.ndarray, scales: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a table, and the allowed error of each element."""
    if scales is not None:
        steps = np.repeat(scales.astype(np.float32), table_ND.shape[1] // scales.shape[1], 1)
        return (table_ND.astype(np.float32) - 128) * steps, steps * _HALF_STEP
    found = table_ND.astype(np.float32)
    return found, np.abs(found) * (2.0**-11 if table_ND.dtype == np.float16 else 0)  # half a unit of 11 bits


def _map_problem(
    directory: Path, nodes: Mapping[str, Any], tensors: Mapping[str, Any], layer: int, affine: AffineMap
) -> str:
    """How a layer's map in the graph differs from the fitted map; "" if it does not differ."""
    bias = tensors.get(f"nbl.layers.{layer}.bias")
    places = {name: f"/nbl/layers.{layer}/{_PRODUCTS[name]}" for name in affine.matrices}
    if any(place not in nodes for place in places.values()):
        return f"layer {layer} has no map"
    if (bias is not None) != affine.has_bias:
        return f"layer {layer} has {'no' if bias is None else 'a'} bias"
    found_bias = np.zeros(0) if bias is None else _array(bias, directory)
    if bias is not None and not np.array_equal(found_bias, affine.bias.astype(found_bias.dtype)):
        return f"layer {layer}'s bias is not the fitted one"
    for name, matrix in affine.matrices.items():
        blocks = nodes.get(f"{places[name]}/DequantizeLinear")
        found, allowed = (
            _blocks_of(blocks, tensors, directory) if blocks else _weight_of(nodes[places[name]], tensors, directory)
        )
        if found.shape != matrix.shape or (np.abs(found - matrix) > allowed).any():
            return f"layer {layer}'s {name} is not the fitted one"
    return ""


def _weight_of(node: Any, tensors: Mapping[str, Any], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """The matrix W of a map y = x W' + b, and the allowed error of each element."""
    arrays = [_array(tensors[name], directory) for name in node.input[1:] if name]
    if node.op_type == "MatMul":
        weight = arrays[0].astype(np.float32).T
        # half a unit of the last of 11 bits; numbers below 2^-14 have fewer bits
        rounding = np.maximum(np.abs(weight) * 2.0**-11, 2.0**-25)
        return weight, rounding if arrays[0].dtype == np.float16 else np.zeros_like(weight)
    attributes = {a.name: a.i for a in node.attribute}
    bits, block, size = attributes["bits"], attributes["block_size"], attributes["K"]
    packed, scales = arrays[0].reshape(attributes["N"], -1), arrays[1].reshape(attributes["N"], -1).astype(np.float32)
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(attributes["N"], -1)
    zero = 2 ** (bits - 1)
    if len(arrays) > 2:
        points = arrays[2].reshape(attributes["N"], -1)
        points = points if bits == 8 else np.stack([points & 15, points >> 4], -1).reshape(attributes["N"], -1)
        zero = np.repeat(points.astype(np.float32)[:, : scales.shape[1]], block, 1)[:, :size]
    steps = np.repeat(scales, block, 1)[:, :size]
    found = (codes[:, :size].astype(np.float32) - zero) * steps
    added = tensors.get(f"{node.input[2].removesuffix('_scales')}_offsets")
    if added is not None:
        found = found + np.repeat(_array(added, directory).T, block, 1)
    return found, np.abs(steps) * _STEPS + 1e-30


def _blocks_of(node: Any, tensors: Mapping[str, Any], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Like `_weight_of`, for a weight [K, N] in blocks along K: the DequantizeLinear that its MatMul reads."""
    codes, scales = (_array(tensors[name], directory).astype(np.float32) for name in node.input)
    block = next(a.i for a in node.attribute if a.name == "block_size")
    steps = np.repeat(scales, block, 0)
    return (codes * steps).T, np.abs(steps).T * _STEPS + 1e-30


def check_untouched(directory: Path, original: Path) -> list[RungResult]:
    """Check that every weight of the NBL graph except the maps equals an original weight byte for byte."""
    ours, theirs = (onnx.load(str(d / GRAPH_FILE), load_external_data=False).graph for d in (directory, original))
    known = {t.name: t for t in theirs.initializer}
    carried = [t for t in ours.initializer if not (_OURS.match(t.name) or t.name.startswith(_SHAPES))]
    changed = [t.name for t in carried if t.name not in known or not _same(t, directory, known[t.name], original)]
    detail = f"{changed[0]} differs" if changed else f"{len(carried)} of {len(known)} weights carried over"
    return [_verdict("a", "nbl", "weights untouched", not changed, detail)]


def _same(tensor: Any, directory: Path, other: Any, original: Path) -> bool:
    return (
        tensor.data_type == other.data_type
        and list(tensor.dims) == list(other.dims)
        and _array(tensor, directory).tobytes() == _array(other, original).tobytes()
    )


def _array(tensor: Any, directory: Path) -> np.ndarray:
    found: np.ndarray = onnx.numpy_helper.to_array(tensor, base_dir=str(directory))
    return found


def _verdict(rung: str, subject: str, metric: str, passed: bool, detail: str = "") -> RungResult:
    return RungResult(rung, subject, metric, 0.0 if passed else 1.0, 0.5, passed, detail)
