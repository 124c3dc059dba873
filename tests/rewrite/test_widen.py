"""The float32 twin of one quantised product, against what ONNX Runtime computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from nbl_export.rewrite.widen import save_twin

SIZE, OUTPUTS, BLOCK = 64, 8, 32


def product(path: Path, *, zeros: bool, bias: bool) -> Path:
    """A graph of one MatMulNBits of 4 bits; absent inputs before the bias have no name."""
    rng = np.random.default_rng(5)
    arrays: dict[str, np.ndarray | None] = {
        "codes": rng.integers(0, 256, (OUTPUTS, SIZE // BLOCK, BLOCK // 2), dtype=np.uint8),
        "scales": (rng.random(OUTPUTS * SIZE // BLOCK) + 0.5).astype(np.float32),
        "zeros": rng.integers(0, 256, OUTPUTS * SIZE // BLOCK // 2, dtype=np.uint8) if zeros else None,
        "": None,  # the order of groups, which no exporter writes
        "bias": (50 * rng.standard_normal(OUTPUTS)).astype(np.float32) if bias else None,
    }
    names = [name if array is not None else "" for name, array in arrays.items()]
    attributes: dict[str, Any] = {"K": SIZE, "N": OUTPUTS, "bits": 4, "block_size": BLOCK}
    node = helper.make_node("MatMulNBits", ["x", *names], ["y"], "product", domain="com.microsoft", **attributes)
    ends = (
        helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", d]) for n, d in (("x", SIZE), ("y", OUTPUTS))
    )
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None]
    graph = helper.make_graph([node], "graph", [next(ends)], [next(ends)], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_twin_of_a_product_computes_the_same(bias: bool, zeros: bool, tmp_path: Path) -> None:
    graph = product(tmp_path / "model.onnx", zeros=zeros, bias=bias)
    save_twin(graph, tmp_path / "twin")
    x = np.random.default_rng(0).standard_normal((3, SIZE)).astype(np.float32)
    packed, wide = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for path in (graph, tmp_path / "twin" / "model.onnx")
    )
    np.testing.assert_allclose(wide, packed, rtol=1e-4, atol=1e-3)
    kinds = [node.op_type for node in onnx.load(tmp_path / "twin" / "model.onnx").graph.node]
    assert kinds == (["MatMul", "Add"] if bias else ["MatMul"])
