"""Constants that are added to a graph: what the graph declares is what it stores."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Emitter, add_initializer, register


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
    Emitter(graph).constant("two", array)
    add_initializer(graph, "three", array, kind)
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
    assert Emitter(graph).constant("one", np.array(3, np.float32)).const_value is not None
    assert float(graph.initializers["one"].const_value.numpy()) == 1  # type: ignore[union-attr]
