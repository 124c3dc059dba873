"""Quantised products in blocks become products of int8 rows.

    before   MatMulNBits(x, codes in blocks, scales)           8 bits, symmetric
    after    RowwiseMatMul(x, inverse, codes, scales, ...)     see `graph.rowwise`

Each input channel k is divided by a balance s_k, and row k of the weights is multiplied by it. Rounding x / s with a
step a, and column n of s W with a step w_n, gives a product of T tokens and N columns the expected squared error

    T / 12 sum_k (a^2 s_k^2 sum_n W_kn^2  +  sum_n w_n^2 E[x_k^2] / s_k^2),

which is least at s_k^4 ~ E[x_k^2] / sum_n W_kn^2 for given steps. Products that read one value share one balance. The
moments E[x_k^2] come from a run of the graph before (`moment_outputs`).

The head stays: for generation it computes one token, and that costs the same in both forms. A product stays if its
codes have zero points, or if another node reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nbl_export.graph.emitter import need, register
from nbl_export.graph.rowwise import DOMAIN, NAME, STEP, ZERO, rowwise_function

__all__ = ["MakeRowwise", "moment_outputs"]

_BITS = 8
_MOMENT = "nbl.moment."
_INPUTS_OF_CODES = 3  # x, codes, scales; further inputs are zero points, an order of groups, a bias
_LARGEST = 127
_SCALES = 3  # place among the inputs of a converted product


def moment_outputs(model: ir.Model) -> dict[str, str]:
    """Give a graph in place one more output for each product's input: the sum of squares of each channel.

    Returns:
        name of the new output -> name of the input.
    """
    graph = model.graph
    axes = register(graph, ir.tensor(np.array([0, 1]), name=f"{_MOMENT}axes"))
    outputs = {}
    for number, x in enumerate(_by_input(graph)):
        total = ir.val(f"{_MOMENT}{number}", ir.DataType.FLOAT, [None])
        graph.append(ir.node("ReduceSumSquare", [x, axes], {"keepdims": 0}, outputs=[total]))
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
        function = ir.from_proto(rowwise_function())
        model.functions[function.identifier()] = function
        graph.opset_imports[DOMAIN] = 1
        shared = [
            register(graph, ir.tensor(STEP, name="nbl.rowwise.step")),
            register(graph, ir.tensor(ZERO, name="nbl.rowwise.zero")),
        ]
        for x, nodes in by_input.items():
            balance_K = self._balance(x, nodes)
            # ONNX Runtime leaves out a product with the scalar 1.
            left = np.float32(1) if _scaled_before(x, 1 / balance_K) else 1 / balance_K
            inverse = register(graph, ir.tensor(np.asarray(left), name=f"{x.name}/inverse"))
            for node in nodes:
                _convert(graph, node, inverse, balance_K, shared)
        return ir.passes.PassResult(model, modified=True)

    def _balance(self, x: ir.Value, nodes: list[ir.Node]) -> npt.NDArray[np.float32]:
        """s_k, with a mean square of 1; 1 for channels of which nothing is known."""
        weight_K = sum(np.square(_Blocks.of(node).dense()).sum(1) for node in nodes)
        moment_K = self._moments.get(str(x.name), np.zeros_like(weight_K))
        known = (moment_K > 0) & (weight_K > 0)
        if not known.any():
            return np.ones_like(weight_K, np.float32)
        balance_K = np.ones_like(weight_K, np.float64)
        balance_K[known] = (moment_K[known] / weight_K[known]) ** 0.25
        balance_K[known] /= np.sqrt(np.square(balance_K[known]).mean())
        return balance_K.astype(np.float32)


@dataclass(frozen=True)
class _Blocks:
    """The matrix [K, N] of a MatMulNBits, in codes of 8 bits without zero points."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    rows: int
    columns: int
    block: int

    @classmethod
    def of(cls, node: ir.Node) -> _Blocks:
        codes, scales = (need(value, node.name or "").const_value for value in node.inputs[1:_INPUTS_OF_CODES])
        assert codes is not None and scales is not None
        return cls(codes, scales, *(node.attributes[name].as_int() for name in ("K", "N", "block_size")))

    def dense(self) -> npt.NDArray[np.float32]:
        """The matrix in float32."""
        codes = self.codes.numpy().reshape(self.columns, -1, self.block).astype(np.float32) - (1 << _BITS - 1)
        blocks = codes * self.scales.numpy().reshape(self.columns, -1, 1)
        matrix_NK: npt.NDArray[np.float32] = blocks.reshape(self.columns, -1)[:, : self.rows]
        return matrix_NK.T

    def row_codes(
        self, name: str, balance_K: npt.NDArray[np.float32], scale_N: npt.NDArray[np.float32]
    ) -> ir.TensorProtocol:
        """Codes [K, N] of the balanced matrix, with a scale a column."""
        return ir.tensor(np.rint(balance_K[:, None] * self.dense() / scale_N).astype(np.int8), name=name)


def _by_input(graph: ir.Graph) -> dict[ir.Value, list[ir.Node]]:
    """Products that can be converted, by what they read."""
    width = next((v.shape[-1] for v in graph.outputs if v.name == "logits" and v.shape is not None), None)
    found: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        x = node.inputs[0] if node.inputs else None
        if x is not None and _is_convertible(node) and node.attributes["N"].as_int() != width:
            found.setdefault(x, []).append(node)
    return found


def _scaled_before(x: ir.Value, inverse_K: npt.NDArray[np.floating]) -> bool:
    """Scale the columns of a converted product that is a factor of x, and so x; returns whether there is one.

    x = silu(gate) * up is such a value: the balance of `down` costs nothing.
    """
    product = x.producer()
    is_ours = all(_is_convertible(node) for node, _ in x.uses())
    if product is None or product.op_type != "Mul" or x.is_graph_output() or not is_ours:
        return False
    for factor in product.inputs:
        node = None if factor is None else factor.producer()
        if node is not None and node.op_type == NAME and len(node.outputs[0].uses()) == 1:
            scales = need(node.inputs[_SCALES], f"scales of {node.name}")
            assert scales.const_value is not None
            scales.const_value = ir.tensor(scales.const_value.numpy() * inverse_K, name=scales.name)
            return True
    return False


def _is_convertible(node: ir.Node) -> bool:
    if node.op_type != "MatMulNBits" or node.attributes["bits"].as_int() != _BITS:
        return False
    given = [value for value in node.inputs[1:] if value is not None]
    return len(given) == _INPUTS_OF_CODES - 1 and all(
        value.is_initializer() and value.const_value is not None and len(value.uses()) == 1 for value in given
    )


def _convert(
    graph: ir.Graph, node: ir.Node, inverse: ir.Value, balance_K: npt.NDArray[np.float32], shared: list[ir.Value]
) -> None:
    matrix = _Blocks.of(node)
    scale_N = np.abs(balance_K[:, None] * matrix.dense()).max(0) / _LARGEST
    scale_N[scale_N == 0] = 1
    name = f"{node.name}/codes"
    codes = ir.LazyTensor(  # made when the graph is written, so that memory holds one matrix
        partial(matrix.row_codes, name, balance_K, scale_N),
        ir.DataType.INT8,
        ir.Shape([matrix.rows, matrix.columns]),
        name=name,
    )
    scales = ir.tensor(scale_N, name=f"{node.name}/scales")
    x, *old = node.inputs[:_INPUTS_OF_CODES]
    inputs = [x, inverse, register(graph, codes), register(graph, scales), *shared]
    product = ir.node(NAME, inputs, domain=DOMAIN, name=node.name)
    ir.convenience.replace_nodes_and_values(graph, node, [node], [product], node.outputs, product.outputs)
    for value in old:
        if value is not None:
            del graph.initializers[str(value.name)]
