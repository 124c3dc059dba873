"""The scale of attention is on the queries alone: no layer multiplies its cache, and a wrong scale shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.static_form.check import CheckForm
from nbl_export.targets.tensorrt.static_form.numbers import ScaledQueries

from ..static_tiny import ARCHITECTURES, HEAD, LAYERS, TOLERANCE, single_row_error, torch_logits

Form = Callable[[str], ir.Model]
CHANGES_VALUES = {"Mul", "Div", "Add", "Sub", "Cast", "MatMul"}


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def readers(value: ir.Value) -> list[str]:
    return [use.node.op_type for use in value.uses()]


def factor_of(attention: ir.Node) -> float:
    """The constant that multiplies an attention's query."""
    query = attention.inputs[0]
    assert query is not None
    product = query.producer()
    assert product is not None and product.op_type == "Mul"
    factor = product.inputs[1]
    assert factor is not None and factor.const_value is not None
    return float(factor.const_value.numpy())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_query_is_scaled(architecture: str, precision: str, form: Form) -> None:
    model = form(architecture)
    static.finish(model, precision)
    assert len(attentions(model)) == LAYERS
    for node in attentions(model):
        assert node.attributes.get_float("scale", 0.0) == 1.0
        assert factor_of(node) == pytest.approx(1 / math.sqrt(HEAD), rel=2**-8)
    caches = [v for v in [*model.graph.inputs, *model.graph.outputs] if "key" in str(v.name) or "value" in str(v.name)]
    assert len(caches) == 4 * LAYERS
    for cache in caches:
        assert set(readers(cache)) <= {"TensorScatter", "Attention"}, cache.name
        assert not CHANGES_VALUES & set(readers(cache))


def without_the_product(model: ir.Model) -> None:
    for node in attentions(model):
        product = node.inputs[0].producer()  # type: ignore[union-attr]
        assert product is not None
        node.replace_input_with(0, product.inputs[0])


def scaled_twice(model: ir.Model) -> None:
    for node in attentions(model):
        node.attributes.pop("scale")


def keys_scaled(model: ir.Model) -> None:
    for node in attentions(model):
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.125)


@pytest.mark.parametrize("fault", [without_the_product, scaled_twice])
def test_a_wrong_scale_shows(
    fault: Callable[[ir.Model], None], form: Form, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    expected, lengths = torch_logits(tiny("llama"))[0], [30, *[1] * 8]
    model = form("llama")
    static.save_graph(model, tmp_path / "right")
    assert single_row_error(tmp_path / "right" / "decoder.onnx", expected, lengths, 16) < TOLERANCE["fp32"]
    fault(model)
    static.save_graph(model, tmp_path / "wrong")
    assert single_row_error(tmp_path / "wrong" / "decoder.onnx", expected, lengths, 16) > 100 * TOLERANCE["fp32"]


@pytest.mark.parametrize("fault", [scaled_twice, keys_scaled])
def test_the_check_refuses_a_scale_that_reaches_the_keys(fault: Callable[[ir.Model], None], form: Form) -> None:
    model = form("mistral")
    CheckForm()(model)
    fault(model)
    with pytest.raises(Exception, match="scales its keys") as caught:
        CheckForm()(model)
    assert any(isinstance(e, RefusalError) for e in (caught.value, caught.value.__cause__))


@pytest.mark.parametrize(("stated", "factor"), [(None, 1 / 8), (0.4, 0.4), (1.0, None)])
def test_the_stated_scale_is_taken_and_one_needs_no_product(stated: float | None, factor: float | None) -> None:
    """A stated scale counts; a scale of 1 leaves the graph as it was."""
    model = attention_of(() if stated is None else (ir.AttrFloat32("scale", stated),))
    before = [node.op_type for node in model.graph]
    assert ScaledQueries()(model).modified is (factor is not None)
    (node,) = attentions(model)
    assert node.attributes.get_float("scale", 0.0) == 1.0
    if factor is None:
        assert [n.op_type for n in model.graph] == before
    else:
        assert factor_of(node) == pytest.approx(factor)
    assert not ScaledQueries()(model).modified


def attention_of(attributes: Sequence[ir.Attr]) -> ir.Model:
    query, key, value = (
        ir.Value(name=n, shape=ir.Shape([1, 4, t, HEAD]), type=ir.TensorType(ir.DataType.FLOAT))
        for n, t in (("q", 1), ("k", 8), ("v", 8))
    )
    node = ir.Node("", "Attention", [query, key, value], list(attributes), name="attention")
    graph = ir.Graph([query, key, value], node.outputs, nodes=[node], opset_imports={"": 24}, name="one")
    return ir.Model(graph, ir_version=11)
