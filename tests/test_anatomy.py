"""The recogniser on attention written out in small operators, as exporters without fusions emit it."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.rewrite.anatomy import cache_layers, find_block

# One layer. Two additions come before the residual one: the rotary sum on the query side and the mask on the
# scores. The mask is made from the past length, which is read off the cache's shape.
DECOMPOSED = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (float[B,T,8] hidden, float[B,1,P,8] past_key_values_0_key, float[B,1,P,8] past_key_values_0_value,
         float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8,8] wo, float[T,8] cos, float[T,8] sin, float[1] one)
  => (float[B,T,8] logits, float[B,1,Q,8] present_0_key, float[B,1,Q,8] present_0_value)
{
  normed = Mul(hidden, one)
  q = MatMul(normed, wq)
  k = MatMul(normed, wk)
  v = MatMul(normed, wv)
  q1 = Mul(q, cos)
  q2 = Mul(q, sin)
  qr = Add(q1, q2)
  axis = Constant<value_ints: ints = [1]>()
  k4 = Unsqueeze(k, axis)
  v4 = Unsqueeze(v, axis)
  present_0_key = Concat<axis: int = 2>(past_key_values_0_key, k4)
  past_shape = Shape(past_key_values_0_key)
  past_float = Cast<to: int = 1>(past_shape)
  mask = ReduceSum(past_float)
  q4 = Unsqueeze(qr, axis)
  kt = Transpose<perm: ints = [0, 1, 3, 2]>(present_0_key)
  scores = MatMul(q4, kt)
  masked = Add(scores, mask)
  weights = Softmax(masked)
  present_0_value = Concat<axis: int = 2>(past_key_values_0_value, v4)
  mixed = MatMul(weights, present_0_value)
  squeezed = Squeeze(mixed, axis)
  out = MatMul(squeezed, wo)
  residual = Add(hidden, out)
  logits = Mul(residual, one)
}
"""


def graph(text: str = DECOMPOSED) -> ir.Graph:
    """Parse; the text format has no dots in names, exporters do."""
    parsed = ir.from_onnx_text(text).graph
    for value in (*parsed.inputs, *(v for node in parsed for v in node.outputs)):
        value.name = re.sub(r"_(\d)_(key|value)$", r".\1.\2", str(value.name))
    return parsed


def test_join_is_the_residual_addition_not_the_mask_or_rotary_one() -> None:
    found = find_block(graph(), 0)
    assert found.join.outputs[0].name == "residual"
    assert found.residual.name == "hidden"
    branch = found.join.inputs[found.branch_index]
    assert branch is not None and branch.name == "out"


def test_attention_output_that_leaves_by_a_side_door_is_refused() -> None:
    """A value inside the block is read behind the residual addition too."""
    text = DECOMPOSED.replace("logits = Mul(residual, one)", "logits = Add(residual, squeezed)")
    with pytest.raises(RefusalError, match="layer 0"):
        find_block(graph(text), 0)


def test_half_a_cache_is_refused() -> None:
    text = DECOMPOSED.replace("past_key_values_0_value", "something_else")
    with pytest.raises(RefusalError, match="layer 0: it does not have one key and one value cache"):
        cache_layers(graph(text))


def test_graph_without_caches_is_refused() -> None:
    text = DECOMPOSED.replace("past_key_values_", "memory_")
    with pytest.raises(RefusalError, match=r"no past_key_values\.N\.key inputs"):
        cache_layers(graph(text))
