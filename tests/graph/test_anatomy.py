"""The recogniser on attention written out in small operators, as exporters without fusions emit it."""

from __future__ import annotations

import re

import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import cache_layers, find_block, graph_caches

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


def test_mlp_beside_the_attention_is_refused() -> None:
    """Attention output and MLP output are added to each other before either meets the residual stream."""
    text = DECOMPOSED.replace(
        "residual = Add(hidden, out)", "mlp = MatMul(normed, wo)\n both = Add(mlp, out)\n residual = Add(hidden, both)"
    )
    with pytest.raises(RefusalError, match="layer 0: Add adds its attention output to mlp"):
        find_block(graph(text), 0)


def test_normed_input_is_found_among_small_operators() -> None:
    found = find_block(graph(), 0)
    assert found.normed is not None and found.normed.name == "normed"


def test_attention_on_the_residual_itself_has_no_normed_input() -> None:
    found = find_block(graph(DECOMPOSED.replace("MatMul(normed,", "MatMul(hidden,")), 0)
    assert found.normed is None
    assert [v.name for v in found.projected] == ["hidden"]


def renamed(text: str = DECOMPOSED, **names: str) -> ir.Graph:
    parsed = graph(text)
    for value in (*parsed.inputs, *(v for node in parsed for v in node.outputs)):
        value.name = names.get(str(value.name).replace(".", "_"), value.name)
    return parsed


MERGE_OF_VALUE = "  present_0_value = Concat<axis: int = 2>(past_key_values_0_value, v4)\n"
VALUE_MERGED_FIRST = DECOMPOSED.replace(MERGE_OF_VALUE, "").replace(
    "  present_0_key =", MERGE_OF_VALUE + "  present_0_key ="
)


@pytest.mark.parametrize(
    ("key", "value", "layer"),
    [
        ("past_key_values.0.key", "past_key_values.0.value", 0),
        ("past_key_values.layers.7.keys", "past_key_values.layers.7.values", 7),
        ("past_key_values.0.key", "past_key_values.0.values", 0),
        ("past_key_4", "past_value_4", 4),
        ("key_cache.2", "value_cache.2", 2),
        ("cache.k.1", "cache.v.1", 1),
        ("k", "v", 0),
    ],
)
@pytest.mark.parametrize("text", [DECOMPOSED, VALUE_MERGED_FIRST], ids=["key first", "value first"])
def test_caches_of_all_conventions(text: str, key: str, value: str, layer: int) -> None:
    """The key comes first, whichever the graph merges first."""
    found = renamed(text, past_key_values_0_key=key, past_key_values_0_value=value)
    assert cache_layers(found) == (layer,)
    pasts, presents = graph_caches(found)[layer]
    assert [v.name for v in (*pasts, *presents)] == [key, value, "present.0.key", "present.0.value"]
    assert find_block(found, layer).join.outputs[0].name == "residual"


def test_names_without_a_word_leave_the_order_of_the_graph() -> None:
    for text, names, layer in (
        (DECOMPOSED, ("past.3.0", "past.3.1"), 3), (DECOMPOSED, ("past_key_values_0", "past_key_values_1"), 0),
        (VALUE_MERGED_FIRST, ("past.3.1", "past.3.0"), 3),
    ):  # fmt: skip
        key, value = names if text is DECOMPOSED else names[::-1]
        found = graph_caches(renamed(text, past_key_values_0_key=key, past_key_values_0_value=value))
        assert [v.name for v in found[layer][0]] == list(names)


def test_names_that_contradict_the_graph_are_refused() -> None:
    names = renamed(past_key_values_0_key="past_key_values.1.key")
    with pytest.raises(RefusalError, match="layer 0: it does not have one key and one value cache"):
        cache_layers(names)


def test_branches_of_a_merged_export_are_refused() -> None:
    merged = graph()
    inner = ir.Graph([], [], nodes=[ir.node("Identity", [merged.node(0).outputs[0]])])
    merged.append(ir.node("If", [ir.Value(name="use_cache")], attributes={"then_branch": inner}, name="optimum::if"))
    with pytest.raises(RefusalError, match="its If node optimum::if chooses between parts"):
        cache_layers(merged)


def test_half_a_cache_is_refused() -> None:
    text = DECOMPOSED.replace(", float[B,1,Q,8] present_0_value)", ")")
    with pytest.raises(RefusalError, match="layer 0: it does not have one key and one value cache"):
        cache_layers(graph(text))


def test_a_choice_without_branches_is_refused() -> None:
    found = graph()
    merge = found.outputs[-1].producer()
    assert merge is not None
    merge.op_type = "If"
    with pytest.raises(RefusalError, match="layer 0: it does not have one key and one value cache"):
        cache_layers(found)


def test_a_cache_that_goes_nowhere_is_refused() -> None:
    text = DECOMPOSED.replace("float[1] one)", "float[1] one, float[B,1,P,8] past_key_values_1_key)")
    with pytest.raises(RefusalError, match=r"its input past_key_values\.1\.key is named like a cache"):
        cache_layers(graph(text))


def test_a_hybrid_by_the_genai_builder_is_refused() -> None:
    found = graph()
    found.inputs.append(ir.Value(name="past.1.conv"))
    with pytest.raises(RefusalError, match=r"past\.1\.conv is the state of a layer without attention: only about a"):
        cache_layers(found)


def test_graph_without_caches_is_refused() -> None:
    text = DECOMPOSED.replace(", float[B,1,Q,8] present_0_key, float[B,1,Q,8] present_0_value)", ")")
    with pytest.raises(RefusalError, match="none of its inputs and outputs are key/value caches"):
        cache_layers(graph(text))
