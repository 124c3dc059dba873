"""Constants that are added to a graph: what the graph declares is what it stores."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Maker, ancestors, choose, dependent_nodes, register, values_read


def empty() -> ir.Graph:
    return ir.Graph([], [], nodes=[], name="empty", opset_imports={"": 22})


@pytest.mark.parametrize(
    "array",
    [
        np.float32(2.5), np.array(3, np.int64), np.zeros((0,), np.float32), np.ones((2, 3), np.float16),
        np.ones((3, 2), np.float32).T, np.ones((2, 1), ml_dtypes.int4), np.ones(4, ml_dtypes.bfloat16),
    ],
    ids=lambda a: f"{a.dtype}{list(a.shape)}",
)  # fmt: skip
def test_declared_shape_and_type_are_the_stored_ones(array: np.ndarray) -> None:
    graph, array = empty(), np.asarray(array)
    kind = ir.DataType.from_numpy(array.dtype)
    register(graph, ir.tensor(array, name="one"))
    Maker(graph).constant("two", array)
    Maker(graph, dtype=ir.DataType.INT64).constant("three", array, kind)
    protos = {t.name: t for t in ir.to_proto(ir.Model(graph, ir_version=10)).graph.initializer}
    for name, value in graph.initializers.items():
        stored = value.const_value
        assert stored is not None and value.shape is not None
        assert list(value.shape) == list(array.shape) == list(stored.shape) == list(protos[name].dims)
        assert value.dtype == stored.dtype == kind == protos[name].data_type


def test_a_name_that_is_taken_is_refused() -> None:
    graph = empty()
    register(graph, ir.tensor(np.float32(1), name="one"))
    with pytest.raises(RefusalError, match="already has an initializer one"):
        register(graph, ir.tensor(np.float32(2), name="one"))
    with pytest.raises(RefusalError, match="already has an initializer one"):
        Maker(graph).constant("one", 3)


def test_the_same_name_is_the_same_constant() -> None:
    graph = empty()
    make = Maker(graph, dtype=ir.DataType.FLOAT16, constants="nbl.")
    assert make.constant("one", [1]) is make.constant("one", [1])
    assert graph.initializers["nbl.one"].dtype == ir.DataType.FLOAT16 and len(graph.initializers) == 1


def test_nodes_are_named_and_not_in_the_graph() -> None:
    """Outputs are numbered; a type or shape that a call states replaces the maker's."""
    graph = empty()
    make = Maker(graph, "/nbl/", ir.DataType.INT64)
    first, second = make.several(2, "Split", "parts", make.constant("x", [1, 2]), num_outputs=2)
    total = make("Cast", "total", first, dtype=ir.DataType.FLOAT, shape=[1], to=ir.DataType.FLOAT)
    assert [node.name for node in make.nodes] == ["/nbl/parts", "/nbl/total"] and len(graph) == 0
    assert (first.name, second.name) == ("/nbl/parts/output_0", "/nbl/parts/output_1")
    assert (second.dtype, total.dtype, total.shape) == (ir.DataType.INT64, ir.DataType.FLOAT, ir.Shape([1]))
    assert Maker(graph, output="")("Neg", "alone", first).name == "alone"


def test_a_choice_reads_what_its_branches_take_from_outside() -> None:
    condition, x = (ir.val(name, ir.DataType.BOOL, [1]) for name in ("condition", "x"))
    make = Maker(empty())
    inner = make("Not", "not", x)
    branch = ir.Graph([], [make("And", "and", inner, x)], nodes=make.nodes, name="branch")
    choice = choose(condition, branch, branch.clone(allow_outer_scope_values=True), "choice")
    graph = ir.Graph([condition, x], choice.outputs, nodes=[choice], name="outer", opset_imports={"": 22})
    assert [value.name for value in values_read(choice)] == ["condition", "x", "x", "x", "x"]
    assert list(dependent_nodes(graph, [x])) == [choice]
    assert list(ancestors(choice.outputs[0], [])) == [choice.outputs[0], x, condition]
    again = make("Not", "again", inner)
    assert list(ancestors(again, [inner, again])) == [again, inner]
