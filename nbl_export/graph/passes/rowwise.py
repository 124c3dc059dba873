"""Quantised products in blocks become products of int8 rows.

    before   MatMulNBits(x, codes in blocks, scales)           8 bits, symmetric
             MatMul(x, W float32)                              if a graph has no quantised products
    after    RowwiseMatMul(x, inverse, codes, scales, ...)     see `graph.rowwise`

Each input channel k is divided by a balance s_k, and row k of the weights is multiplied by it. Rounding x / s with a
step a, and column n of s W with a step w_n, gives a product of T tokens and N columns the expected squared error

    T / 12 sum_k (a^2 s_k^2 sum_n W_kn^2  +  sum_n w_n^2 E[x_k^2] / s_k^2),

which is least at s_k^4 ~ E[x_k^2] / sum_n W_kn^2 for given steps. Products that read one value share one balance. The
moments E[x_k^2] come from a run of the graph before (`moment_outputs`).

A head in blocks stays: for generation it computes one token, and that costs the same in both forms. A product stays if
its codes have zero points, or if another node reads its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nbl_export.graph.emitter import need, register
from nbl_export.graph.rowwise import DOMAIN, NAME, STEP, ZERO, rowwise_function
from nbl_export.records.quantised import unpacked

__all__ = ["MakeRowwise", "moment_outputs"]

_BITS = 8
_MOMENT = "nbl.moment."
_LARGEST = 127
_OPERANDS = 2  # codes and scales; a MatMulNBits with zero points or an order of groups has more
_SCALES = 3  # place among the inputs of a converted product


def moment_outputs(model: ir.Model) -> dict[str, str]:
    """Give a graph in place one more output for each product's input: the sum of squares of each channel.

    Returns:
        name of the new output -> name of the input.
    """
    graph = model.graph
    axes = register(graph, ir.tensor(np.array([0]), name=f"{_MOMENT}axes"))
    outputs = {}
    for number, (x, matrices) in enumerate(_by_input(graph).items()):
        width = next(iter(matrices.values())).shape[0]
        shape = register(graph, ir.tensor(np.array([-1, width]), name=f"{_MOMENT}{number}.shape"))
        rows = ir.node("Reshape", [x, shape])
        total = ir.val(f"{_MOMENT}{number}", ir.DataType.FLOAT, [None])
        graph.extend([rows, ir.node("ReduceSumSquare", [rows.outputs[0], axes], {"keepdims": 0}, outputs=[total])])
        graph.outputs.append(total)
        outputs[str(total.name)] = str(x.name)
    return outputs


class MakeRowwise(ir.passes.InPlacePass):
    """Convert all products that can be converted.

    Args:
        moments: name of a product's input -> E[x_k^2] [K], up to a factor. An input that is not named is not balanced.
    """

    def __init__(self, moments: Mapping[str, npt.NDArray[np.floating]]) -> None:
        super().__init__()
        self._moments = moments

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        by_input = _by_input(graph)
        if not by_input:
            return ir.passes.PassResult(model, modified=False)
        function = ir.from_proto(rowwise_function(model.opset_imports[""]))
        model.functions[function.identifier()] = function
        graph.opset_imports[DOMAIN] = 1
        shared = [
            register(graph, ir.tensor(STEP, name="nbl.rowwise.step")),
            register(graph, ir.tensor(ZERO, name="nbl.rowwise.zero")),
        ]
        for x, matrices in by_input.items():
            balance_K = self._balance(x, list(matrices.values()))
            is_alone = len(x.uses()) == len(matrices) and not x.is_graph_output()
            # ONNX Runtime leaves out a product with the scalar 1.
            left = np.float32(1) if is_alone and _scaled_before(x, 1 / balance_K) else 1 / balance_K
            inverse = register(graph, ir.tensor(np.asarray(left), name=f"{x.name}/inverse"))
            for node, matrix in matrices.items():
                _convert(graph, node, matrix, inverse, balance_K, shared)
        return ir.passes.PassResult(model, modified=True)

    def _balance(self, x: ir.Value, matrices: list[_Matrix]) -> npt.NDArray[np.float32]:
        """s_k, with a mean square of 1; 1 for channels of which nothing is known."""
        weight_K = sum(np.square(matrix.dense()).sum(1) for matrix in matrices)
        moment_K = self._moments.get(str(x.name), np.zeros_like(weight_K))
        known = (moment_K > 0) & (weight_K > 0)
        if not known.any():
            return np.ones_like(weight_K, np.float32)
        balance_K = np.ones_like(weight_K, np.float64)
        balance_K[known] = (moment_K[known] / weight_K[known]) ** 0.25
        balance_K[known] /= np.sqrt(np.square(balance_K[known]).mean())
        return balance_K.astype(np.float32)


@dataclass(frozen=True)
class _Matrix:
    """A matrix [K, N] of a product, in float32 as often as it is read."""

    shape: tuple[int, int]
    dense: Callable[[], npt.NDArray[np.float32]]


def _matrix_of(node: ir.Node) -> _Matrix | None:
    """The matrix of a product that can be converted; None for other nodes."""
    stored = [value for value in node.inputs[1:] if value is not None]
    if node.op_type == "MatMul":
        return _floats_of(stored[0])
    tensors = [_tensor_of(value) for value in stored]
    if node.op_type != "MatMulNBits" or len(tensors) != _OPERANDS:
        return None
    codes, scales = tensors
    bits, rows, columns, block = (node.attributes[name].as_int() for name in ("bits", "K", "N", "block_size"))
    if codes is None or scales is None or bits != _BITS:
        return None
    return _Matrix((rows, columns), partial(_unpacked, codes, scales, block, (columns, rows)))


def _tensor_of(value: ir.Value) -> ir.TensorProtocol | None:
    """A stored tensor that no other node reads."""
    return value.const_value if value.is_initializer() and len(value.uses()) == 1 else None


def _unpacked(
    codes: ir.TensorProtocol, scales: ir.TensorProtocol, block: int, shape: tuple[int, int]
) -> npt.NDArray[np.float32]:
    return unpacked(codes.numpy(), scales.numpy(), None, _BITS, block, shape).values.T


def _floats_of(value: ir.Value) -> _Matrix | None:
    """A stored matrix that no other node reads, or the transpose of any, as a head is that is the embedding."""
    node = value.producer()
    is_turned = node is not None and node.op_type == "Transpose"
    source = node.inputs[0] if node is not None and is_turned else value
    tensor = None if source is None else source.const_value
    if len(value.uses()) != 1 or tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
        return None
    rows, columns = tensor.shape.numpy()
    if is_turned:
        return _Matrix((columns, rows), lambda: tensor.numpy().T)
    return _Matrix((rows, columns), tensor.numpy)


def _row_codes(
    matrix: _Matrix, name: str, balance_K: npt.NDArray[np.float32], scale_N: npt.NDArray[np.float32]
) -> ir.TensorProtocol:
    """Codes [K, N] of the balanced matrix, with a scale a column."""
    return ir.tensor(np.rint(balance_K[:, None] * matrix.dense() / scale_N).astype(np.int8), name=name)


def _by_input(graph: ir.Graph) -> dict[ir.Value, dict[ir.Node, _Matrix]]:
    """Products that are converted, by what they read."""
    width = next((v.shape[-1] for v in graph.outputs if v.name == "logits" and v.shape is not None), None)
    is_quantised = any(node.op_type in ("MatMulNBits", NAME) for node in graph)
    found: dict[ir.Value, dict[ir.Node, _Matrix]] = {}
    for node in graph:
        matrix = _matrix_of(node)
        x = node.inputs[0] if node.inputs else None
        if x is None or matrix is None:
            continue
        if is_quantised and (node.op_type == "MatMul" or matrix.shape[1] == width):
            continue  # left in float on purpose, or the head
        found.setdefault(x, {})[node] = matrix
    return found


def _scaled_before(x: ir.Value, inverse_K: npt.NDArray[np.floating]) -> bool:
    """Scale the columns of a converted product that is a factor of x, and so x; returns whether there is one.

    x = silu(gate) * up is such a value: the balance of `down` costs nothing.
    """
    product = x.producer()
    if product is None or product.op_type != "Mul":
        return False
    for factor in product.inputs:
        node = None if factor is None else factor.producer()
        if node is not None and node.op_type == NAME and len(node.outputs[0].uses()) == 1:
            scales = need(node.inputs[_SCALES], f"scales of {node.name}")
            assert scales.const_value is not None
            scales.const_value = ir.tensor(scales.const_value.numpy() * inverse_K, name=scales.name)
            return True
    return False


def _convert(
    graph: ir.Graph,
    node: ir.Node,
    matrix: _Matrix,
    inverse: ir.Value,
    balance_K: npt.NDArray[np.float32],
    shared: list[ir.Value],
) -> None:
    scale_N = np.abs(balance_K[:, None] * matrix.dense()).max(0) / _LARGEST
    scale_N[scale_N == 0] = 1
    name = f"{node.name}/codes"
    codes = ir.LazyTensor(  # made when the graph is written, so that memory holds one matrix
        partial(_row_codes, matrix, name, balance_K, scale_N), ir.DataType.INT8, ir.Shape(matrix.shape), name=name
    )
    scales = ir.tensor(scale_N, name=f"{node.name}/scales")
    x, *old = node.inputs
    inputs = [x, inverse, register(graph, codes), register(graph, scales), *shared]
    product = ir.node(NAME, inputs, domain=DOMAIN, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)
    for value in old:
        if value is not None and value.is_initializer():
            del graph.initializers[str(value.name)]
        elif value is not None and (transpose := value.producer()) is not None:
            graph.remove(transpose, safe=True)
