"""What targets with ONNX graphs check of their files.

The maps are read from the graph, dequantised if necessary, and compared with maps.safetensors. Every other weight must
equal a weight of the original graph byte for byte. Quantisation noise can hide a lost bias or two exchanged maps from
logits alone; this check finds both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from nbl_export.graph.files import check_structure, load_graph, skeleton
from nbl_export.graph.fp32_activations import graphs_of
from nbl_export.graph.names import ALL_LOGITS_FILE, STATIC_GRAPH_FILE, graph_file
from nbl_export.graph.passes.tail import difference
from nbl_export.records.decoder import ITEMSIZE, GraphContract
from nbl_export.records.quantised import unpacked
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import PRUNED, SPOKEN, ExpectedGraph, StoredWeights, check_cache, checked, judge_maps

__all__ = ["check", "check_files", "check_untouched", "read_maps"]

_OURS = re.compile(r"nbl\.layers\.\d+\.")
_SHAPES = ("nbl.states.", "nbl.exit.")  # begin the names of shapes, indices and tables (`rewrite`)
_OUR_PRODUCT = re.compile(r"/nbl/layers\.\d+/MatMul")
# ONNX Runtime's symmetric quantiser spans [-8, 8) steps: the mirror image of a block's largest value is one step off.
_STEPS = 1.01
_PIECE = 1 << 24  # bytes that are compared at once
_BITS = {"float16": 11, "bfloat16": 8}  # of a number's digits


def check(directory: Path, contract: GraphContract, wanted: ExpectedGraph, original: Path | None) -> list[CheckResult]:
    """See `Target.check`."""
    results = check_files(directory, contract, wanted)
    results.append(judge_maps(wanted.subject, read_maps(directory), wanted.maps))
    if (directory / ALL_LOGITS_FILE).is_file():
        problem = difference(directory)
        results.append(checked(wanted.subject, PRUNED, not problem, problem or "every node and weight"))
    return results if original is None else [*results, *check_untouched(directory, original)]


def check_files(directory: Path, contract: GraphContract, wanted: ExpectedGraph) -> list[CheckResult]:
    """Check that the file is valid ONNX, and that its inputs and outputs are those of the plan."""
    cache = next(a for a in contract.inputs if a.name.startswith("past_key_values."))
    is_static = graph_file(directory) == STATIC_GRAPH_FILE
    ids = range(len(wanted.cache_layers)) if is_static else wanted.cache_layers
    held = {f"past_key_values.{i}.{part}" for i in ids for part in ("key", "value")}
    proto = onnx.load(str(directory / graph_file(directory)), load_external_data=False)
    bare = skeleton(proto)
    problem = check_structure(bare)
    if not problem:
        try:
            onnx.shape_inference.infer_shapes(bare, check_type=True, data_prop=True)
        except Exception as error:  # onnx raises several types
            problem = str(error).splitlines()[0]
    results = [checked(wanted.subject, "onnx checker and shape inference", not problem, problem)]
    in_file = ([v.name for v in proto.graph.input], [v.name for v in proto.graph.output])
    in_session = ([v.name for v in contract.inputs], [v.name for v in contract.outputs])
    has = {n for n in in_file[0] if n.startswith("past_key_values.")}
    gives = {n.replace("present", "past_key_values") for n in in_file[1] if n.startswith("present.")}
    detail = f"caches {len(has) // 2} of {wanted.spec.num_layers} layers, logits {SPOKEN[contract.logits]}"
    kept_word = has == held == gives and in_file == in_session and contract.logits == wanted.logits
    results.append(checked(wanted.subject, "contract", kept_word, detail))
    results.append(check_cache(wanted, contract.cache_bytes_per_token(wanted.spec.head_dim), ITEMSIZE[cache.dtype]))
    return results


def read_maps(directory: Path) -> StoredWeights:
    """What a directory's graph holds of mixers."""
    graph = onnx.load(str(directory / graph_file(directory)), load_external_data=False).graph
    tensors = {t.name: t for t in graph.initializer if _OURS.match(t.name)}
    nodes = [node for part in graphs_of(graph) for node in part.node]
    found = (n for n in nodes if n.op_type in ("MatMul", "MatMulNBits") and _OUR_PRODUCT.match(n.name))
    products = {n.name.partition("_Q")[0]: n for n in found}
    wide = {n.name: n for n in nodes if n.op_type == "DequantizeLinear"}
    vectors = [n for n in nodes if n.op_type in ("Add", "SimplifiedLayerNormalization")]
    added = {c for n in vectors for c in n.input if c in tensors}

    def matrix(product: str) -> tuple[np.ndarray, np.ndarray]:
        blocks = wide.get(f"{product}/DequantizeLinear")
        if blocks is not None:
            return _blocks_of(blocks, tensors, directory)
        return _weight_of(products[product], tensors, directory)

    return StoredWeights(products, {name: _array(tensors[name], directory) for name in added}, matrix)


def _weight_of(node: Any, tensors: Mapping[str, Any], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """The matrix W of a map y = x W' + b, and the allowed error of each element."""
    arrays = [_array(tensors[name], directory) for name in node.input[1:] if name]
    if node.op_type == "MatMul":
        weight = arrays[0].astype(np.float32).T
        bits = _BITS.get(arrays[0].dtype.name)
        # half a unit of the last bit; float16 below 2^-14 has fewer bits
        rounding = np.zeros_like(weight) if bits is None else np.maximum(np.abs(weight) * 2.0**-bits, 2.0**-25)
        return weight, rounding
    own = {a.name: a.i for a in node.attribute}
    zeros = arrays[2] if len(arrays) > 2 else None
    blocks = unpacked(arrays[0], arrays[1], zeros, own["bits"], own["block_size"], (own["N"], own["K"]))
    # a weight, and the step of its block, are each rounded to their type before they become codes
    rounding = 2.0 ** (own["bits"] - _BITS.get(arrays[1].dtype.name, np.inf))
    return blocks.values, np.abs(blocks.steps) * (_STEPS + rounding) + 1e-30


def _blocks_of(node: Any, tensors: Mapping[str, Any], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Like `_weight_of`, for a weight [K, N] in blocks along K: the DequantizeLinear that its MatMul reads."""
    codes, scales = (_array(tensors[name], directory).astype(np.float32) for name in node.input)
    block = next(a.i for a in node.attribute if a.name == "block_size")
    steps = np.repeat(scales, block, 0)
    return (codes * steps).T, np.abs(steps).T * _STEPS + 1e-30


def check_untouched(directory: Path, original: Path) -> list[CheckResult]:
    """Check that every weight of the NBL graph except the maps equals an original weight byte for byte."""
    ours, known = (
        {name: value.const_value for name, value in load_graph(d / graph_file(d)).graph.initializers.items()}
        for d in (directory, original)
    )
    carried = [name for name in ours if not (_OURS.match(name) or name.startswith(_SHAPES))]
    changed = [name for name in carried if name not in known or not _same(ours[name], known[name])]
    detail = f"{changed[0]} differs" if changed else f"{len(carried)} of {len(known)} weights carried over"
    return [checked("nbl", "weights untouched", not changed, detail)]


def _same(tensor: Any, other: Any) -> bool:
    """Whether two tensors have equal types, shapes and bytes; their files are mapped, and compared in pieces."""
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    ours, theirs = (np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8) for t in (tensor, other))
    pieces = range(0, len(ours), _PIECE)
    return all(np.array_equal(ours[at : at + _PIECE], theirs[at : at + _PIECE]) for at in pieces)


def _array(tensor: Any, directory: Path) -> np.ndarray:
    found: np.ndarray = onnx.numpy_helper.to_array(tensor, base_dir=str(directory))
    return found
