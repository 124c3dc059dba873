"""Codes in place of floats: a GGUF file's own codes in a float32 graph, and codes of the maps in a quantised graph.

Puts the codes of a GGUF file in place of a float32 graph's matrices; every value stays the same.

    before   MatMul(x, W')           after   MatMulNBits(x, codes, scales) [-- Add(block sums of x times offsets)]
             Gather(E, ids)                  GatherBlockQuantized(codes, ids, scales) [-- Add(offsets of the rows)]

Q4_0, Q2_K to Q4_K and Q4_1 become 4-bit codes, the others 8-bit codes; types with a minimum get offsets
(`graph.quantised`). A matrix whose rows have several forms, such as q, k and v joined, becomes one product a
form and a Concat. A tied head shares its codes with the embedding. Matrices that the file stores as floats stay. A
matrix that the file does not have is refused.

A matrix that two nodes read, as a tied head, is stored once.

Quantises the maps of an int8 or int4 graph like the graph's other matrices.

    before   MatMul(x, W' float32)      after   MatMulNBits(x, packed, scales[, zero points]) [-- Add(offsets)]

Bits, block size and accuracy level come from the graph's own MatMulNBits nodes. ONNX Runtime packs each map in a graph
that holds nothing else, so memory holds one map at a time. If the graph's matrices have offsets (codes of a GGUF file),
so have the maps: `rounded` fits scales and offsets.

             MatMul(x, W')                  MatMul(x, DequantizeLinear(W4', scale; axis 0, block_size))

A graph with int4 blocks gets blocks of the same size (`graph.quantised`); other graphs do not change.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import MissingPackageError, NblError, RefusalError
from nbl_export.graph.emitter import add_initializer, new_node, register, run_passes
from nbl_export.graph.files import read_graph
from nbl_export.graph.gguf.blocks import RowIndex
from nbl_export.graph.gguf.content import read_content
from nbl_export.graph.quantised import add_lookup_offsets, add_product_offsets, offsets_of, quantize_weight
from nbl_export.records.quantised import Blocks
from nbl_export.rewrite.bypass import Sweep

__all__ = [
    "QuantizeMapBlocks",
    "QuantizeMaps",
    "TakeCodes",
    "lookup_nodes",
    "product_nodes",
    "put",
    "rounded",
    "take_codes",
]

ACCURACY = 4  # activations are rounded to 8 bits


_STEPS = 8
_ROWS = 1024  # rows rounded at once, to save memory
_PREFIX = "/nbl/layers."


def take_codes(graph: Path, gguf: Path, out: Path, accuracy: int = ACCURACY) -> None:
    """Write a float32 graph with the codes of a GGUF file into a directory, under the same name.

    Args:
        accuracy: `accuracy_level` of the products: 1 computes with float32 activations, 4 rounds them to 8 bits.

    Raises:
        NblError: a type is unknown, or the file stores no matrix in blocks.
        RefusalError: the graph has a matrix that the file does not have.
    """
    model = read_graph(graph)
    run_passes([TakeCodes(RowIndex(read_content(gguf)), accuracy), Sweep()], model)
    if not any(node.op_type == "MatMulNBits" for node in model.graph):
        raise NblError(f"{gguf} stores its matrices as floats; use --precision fp32, or --requantize for int8 or int4")
    ir.save(model, out / graph.name, external_data=f"{graph.name}.data")


class TakeCodes(ir.passes.InPlacePass):
    """Replace each product with, and lookup in, a matrix of the file by its form in codes."""

    def __init__(self, rows: RowIndex, accuracy: int = ACCURACY) -> None:
        super().__init__()
        self.rows = rows
        self.accuracy = accuracy

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        changed = False
        for node in list(graph):
            weight = _weight(node)
            if weight is None:
                continue
            matrix, name = _matrix(node, weight), str(weight.name)
            parts = self.rows.codes_of(matrix)
            if parts is None:
                raise RefusalError(None, f"{name} of {node.name} has rows that are not in the GGUF file")
            if not parts:
                continue
            make = _lookup if node.op_type == "Gather" else self._products
            put(graph, node, make(graph, node, name, parts))
            changed = True
        return ir.passes.PassResult(model, modified=changed)

    def _products(self, graph: ir.Graph, node: ir.Node, name: str, parts: Sequence[Blocks]) -> list[ir.Node]:
        made: list[ir.Node] = []
        ends = []
        for number, part in enumerate(parts):
            suffix = f".{number}" if len(parts) > 1 else ""
            title = f"{node.name}{suffix}_Q{part.bits}"
            made += product_nodes(graph, node, f"{name}{suffix}", title, part, self.accuracy)
            ends.append(made[-1].outputs[0])
        if len(parts) > 1:
            made.append(ir.node("Concat", ends, {"axis": -1}, name=f"{node.name}/Concat"))
        return made


def _weight(node: ir.Node) -> ir.Value | None:
    """The stored matrix of a product or of a lookup of rows; None for another node."""
    if node.op_type not in ("MatMul", "Gather"):
        return None
    value = node.inputs[0 if node.op_type == "Gather" else 1]
    maker = None if value is None else value.producer()
    if node.op_type == "Gather" and maker is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]
    if value is None or value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
        return None
    return value if len(value.const_value.shape) == 2 else None


def _matrix(node: ir.Node, weight: ir.Value) -> np.ndarray:
    """The matrix as a GGUF file stores it: [outputs, inputs], or one row a token."""
    assert weight.const_value is not None
    stored = weight.const_value.numpy()
    as_stored = node.op_type == "Gather" and node.inputs[0] is weight
    return stored if as_stored else np.ascontiguousarray(stored.T)


def _lookup(graph: ir.Graph, node: ir.Node, name: str, parts: Sequence[Blocks]) -> list[ir.Node]:
    if len(parts) > 1:
        raise RefusalError(None, f"the rows of {name} have several types in the GGUF file")
    return lookup_nodes(graph, node, name, parts[0])


def product_nodes(graph: ir.Graph, node: ir.Node, name: str, title: str, part: Blocks, accuracy: int) -> list[ir.Node]:
    """Nodes of x W', for the x and beside the output of a MatMul; the last node gives the product.

    Args:
        name, title: begin the names of constants and of nodes. accuracy: `accuracy_level`.
    """
    (rows, columns), old = part.codes.shape, node.outputs[0]
    inputs = [node.inputs[0], *_operands(graph, name, part)]
    shape = None if old.shape is None else ir.Shape([*old.shape[:-1], rows])
    attributes = {"K": columns, "N": rows, "bits": part.bits, "block_size": part.size, "accuracy_level": accuracy}
    product = new_node("MatMulNBits", inputs, title, ir.DataType.FLOAT, shape, attributes, "com.microsoft")
    if part.offsets is None:
        return [product]
    return [product, *add_product_offsets(graph, product, part.offsets, f"{name}_offsets")]


def lookup_nodes(graph: ir.Graph, node: ir.Node, name: str, part: Blocks) -> list[ir.Node]:
    """Nodes of W[ids], for the ids and beside the output of a Gather; the last node gives the rows."""
    codes, *others = _operands(graph, name, part)
    shape = _once(graph, f"{name}_Q{part.bits}.rows", lambda: np.array([len(part.codes), -1], np.int64))
    flat = new_node("Reshape", [codes, shape], f"{node.name}/rows", ir.DataType.UINT8)
    inputs, old = [flat.outputs[0], node.inputs[1], *others], node.outputs[0]
    attributes = {"bits": part.bits, "block_size": part.size, "gather_axis": 0, "quantize_axis": 1}
    title = f"{node.name}_Q"
    lookup = new_node("GatherBlockQuantized", inputs, title, old.dtype, old.shape, attributes, "com.microsoft")
    if part.offsets is None:
        return [flat, lookup]
    return [flat, lookup, *add_lookup_offsets(graph, lookup, part.offsets, f"{name}_row_offsets")]


def put(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """Put nodes in place of one; the last one's output takes over the name."""
    old, new = node.outputs[0], made[-1].outputs[0]
    new.type, new.shape, name = ir.TensorType(ir.DataType.FLOAT), old.shape, old.name
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _operands(graph: ir.Graph, name: str, part: Blocks) -> list[ir.Value]:
    """Codes, scales, and zero points if they are not the middle of the codes' range."""
    rows, blocks = part.scales.shape
    found = [_once(graph, f"{name}_Q{part.bits}", lambda: part.packed)]
    found.append(_once(graph, f"{name}_scales", lambda: part.scales))
    if np.all(part.zeros == 0):
        found.append(_once(graph, f"{name}_zeros", lambda: np.zeros((rows, -(-blocks * part.bits // 8)), np.uint8)))
    return found


def _once(graph: ir.Graph, name: str, make: Callable[[], np.ndarray]) -> ir.Value:
    """The constant of a name, made if the graph lacks it."""
    if name in graph.initializers:
        return graph.initializers[name]
    array = make()
    return add_initializer(graph, name, array, ir.DataType.from_numpy(array.dtype))


def rounded(matrix_NK: np.ndarray, bits: int, size: int) -> Blocks:
    """Round a float32 matrix, whose rows are whole blocks of `size` elements, to codes with a scale and offset a block.

        least squares    sum over a block of (w - scale * q - offset)^2,  q an integer from 0 to 2^bits - 1

    Rounding to nearest and the best scale and offset for these q alternate, from the span of the block on; the best of
    all steps is kept. A step in the wrong direction is possible, because q is bounded.
    """
    parts = [_rounded(matrix_NK[at : at + _ROWS], 2**bits - 1, size) for at in range(0, len(matrix_NK), _ROWS)]
    codes, scales, lows = (np.concatenate(found) for found in zip(*parts, strict=True))
    middle = 2.0 ** (bits - 1)
    return Blocks(codes, scales, size, middle, lows + np.float32(middle) * scales, bits)


def _rounded(rows_NK: np.ndarray, most: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [N, K], scales and values of the code 0 [N, K / size]."""
    blocks = rows_NK.reshape(len(rows_NK), -1, size).astype(np.float32)
    low = blocks.min(-1, keepdims=True)
    scale = _positive((blocks.max(-1, keepdims=True) - low) / most)
    best = best_scale = best_low = np.empty(0)
    least = np.full(low.shape, np.inf, np.float32)
    for _ in range(_STEPS):
        q = np.clip(np.rint((blocks - low) / scale), 0, most)
        error = np.square(blocks - q * scale - low).sum(-1, keepdims=True)
        better = error < least
        if not best.size:
            best, best_scale, best_low = q, scale, low
        best, least = np.where(better, q, best), np.where(better, error, least)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, low, best_low)
        scale, low = _fitted(blocks, q, scale)
    return best.astype(np.uint8).reshape(rows_NK.shape), best_scale[..., 0], best_low[..., 0]


def _fitted(blocks: np.ndarray, q: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the offset of least squares for given codes."""
    mean_q, mean = q.mean(-1, keepdims=True), blocks.mean(-1, keepdims=True)
    spread = np.square(q - mean_q).sum(-1, keepdims=True)
    slope = ((q - mean_q) * (blocks - mean)).sum(-1, keepdims=True) / np.where(spread == 0, 1, spread)
    scale = np.where((spread == 0) | (slope <= 0), before, slope).astype(np.float32)
    return scale, (mean - scale * mean_q).astype(np.float32)


def _positive(scale: np.ndarray) -> np.ndarray:
    """The scale, or 1 for a block of equal elements."""
    return np.where(scale > 0, scale, np.float32(1))


@dataclass(frozen=True)
class _Scheme:
    bits: int
    block_size: int
    accuracy_level: int
    symmetric: bool
    offsets: bool


class QuantizeMaps(ir.passes.InPlacePass):
    """Turn the MatMul of each bypass into MatMulNBits if the graph has MatMulNBits; else do nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        scheme = _scheme_of(model.graph)
        ours = (n for n in model.graph if n.op_type == "MatMul" and (n.name or "").startswith(_PREFIX))
        maps = [n for n in ours if n.inputs[1] is not None and n.inputs[1].const_value is not None]
        if scheme is None or not maps:
            return ir.passes.PassResult(model, modified=False)
        for node in maps:
            _quantize(model.graph, node, scheme)
        return ir.passes.PassResult(model, modified=True)


def _scheme_of(graph: ir.Graph) -> _Scheme | None:
    """The most common scheme of the decoder's matrices (an lm_head may have another scheme)."""
    seen = Counter(
        _Scheme(
            node.attributes["bits"].as_int(),
            node.attributes["block_size"].as_int(),
            node.attributes["accuracy_level"].as_int() if "accuracy_level" in node.attributes else 0,
            len(node.inputs) < 4 or node.inputs[3] is None,
            offsets_of(node) is not None,
        )
        for node in graph
        if node.op_type == "MatMulNBits"
    )
    return seen.most_common(1)[0][0] if seen else None


def _quantize(graph: ir.Graph, node: ir.Node, scheme: _Scheme) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    if scheme.offsets and weight.const_value.shape.numpy()[0] % scheme.block_size == 0:
        _quantize_with_offsets(graph, node, weight, scheme)
        return
    packed, constants = _pack(weight.const_value, scheme)
    inputs = [node.inputs[0], *(register(graph, constant) for constant in constants)]
    replacement = ir.node(
        "MatMulNBits",
        inputs,
        attributes=packed.attributes.copy(),
        domain="com.microsoft",
        name=f"{node.name}_Q{scheme.bits}",
    )
    output, old = replacement.outputs[0], node.outputs[0]
    output.shape, output.type = old.shape, old.type
    graph.insert_before(node, [replacement])
    old.replace_all_uses_with(output)
    graph.remove(node, safe=True)
    output.name = old.name
    del graph.initializers[str(weight.name)]


def _quantize_with_offsets(graph: ir.Graph, node: ir.Node, weight: ir.Value, scheme: _Scheme) -> None:
    assert weight.const_value is not None
    part = rounded(np.ascontiguousarray(weight.const_value.numpy().T), scheme.bits, scheme.block_size)
    title = f"{node.name}_Q{scheme.bits}"
    put(graph, node, product_nodes(graph, node, str(weight.name), title, part, scheme.accuracy_level))
    del graph.initializers[str(weight.name)]


def _pack(weight: ir.TensorProtocol, scheme: _Scheme) -> tuple[ir.Node, list[ir.TensorProtocol]]:
    """Run ONNX Runtime's quantiser on a graph of this one matrix; returns its node and constants."""
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as nbits
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "cpu", "quantising the maps") from error

    shape, dtype = weight.shape.numpy(), ir.TensorType(weight.dtype)
    constant = ir.Value(name=weight.name, const_value=weight, shape=ir.Shape(shape), type=dtype)
    x = ir.Value(name="x", shape=ir.Shape(["N", shape[0]]), type=dtype)
    product = ir.node("MatMul", [x, constant], name="map")
    product.outputs[0].name = "y"
    product.outputs[0].type = dtype
    graph = ir.Graph([x], product.outputs, nodes=[product], initializers=[constant], opset_imports={"": 21})
    config = nbits.DefaultWeightOnlyQuantConfig(
        block_size=scheme.block_size,
        is_symmetric=scheme.symmetric,
        accuracy_level=scheme.accuracy_level,
        bits=scheme.bits,
    )
    logging.disable(logging.INFO)  # the quantiser logs each node
    try:
        quantizer = nbits.MatMulNBitsQuantizer(ir.to_proto(ir.Model(graph, ir_version=10)), algo_config=config)
        quantizer.process()
    finally:
        logging.disable(logging.NOTSET)
    result = ir.from_proto(quantizer.model.model).graph
    (node,) = [n for n in result if n.op_type == "MatMulNBits"]
    return node, [v.const_value for v in node.inputs[1:] if v is not None and v.const_value is not None]


class QuantizeMapBlocks(ir.passes.InPlacePass):
    """Quantise the MatMul of each bypass if the graph's other matrices are int4 blocks; else do nothing."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        block = _block_of(model.graph)
        ours = (n for n in model.graph if n.op_type == "MatMul" and (n.name or "").startswith(_PREFIX))
        maps = [n for n in ours if n.inputs[1] is not None and n.inputs[1].const_value is not None]
        done = [] if block is None else [node for node in maps if quantize_weight(model.graph, node, block)]
        return ir.passes.PassResult(model, modified=bool(done))


def _block_of(graph: ir.Graph) -> int | None:
    """The most common block size of int4 matrices that a MatMul reads."""
    seen = Counter(
        node.attributes["block_size"].as_int()
        for node in graph
        if node.op_type == "DequantizeLinear"
        and "block_size" in node.attributes
        and node.inputs[0] is not None
        and node.inputs[0].dtype == ir.DataType.INT4
        and any(user.op_type == "MatMul" for user in node.outputs[0].consumers())
    )
    return seen.most_common(1)[0][0] if seen else None
