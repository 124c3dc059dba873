"""Constants that are added to a graph: what the graph declares is what it stores."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import nbl_export
from nbl_export.errors import RefusalError
from nbl_export.graph.emitter import Emitter, add_initializer, register

PACKAGE = Path(nbl_export.__file__).parent


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


def test_one_function_registers_constants() -> None:
    """A second one could declare something else than it stores."""
    found = {p.relative_to(PACKAGE).as_posix(): p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    calls = {name: text.count(".register_initializer(") for name, text in found.items()}
    assert {name: n for name, n in calls.items() if n} == {"graph/emitter.py": 1}
