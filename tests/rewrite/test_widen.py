"""The float32 twin of one quantised operator, against what ONNX Runtime computes."""

from __future__ import annotations

from collections.abc import Mapping
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
    return saved(path, node, arrays, {"x": SIZE}, OUTPUTS)


def saved(path: Path, node: Any, arrays: Mapping[str, np.ndarray | None], inputs: Mapping[str, int], out: int) -> Path:
    """A graph of one node; the sizes are of inputs and output y."""
    given, found = (
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", d]) for n, d in sizes.items()]
        for sizes in (inputs, {"y": out})
    )
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None]
    graph = helper.make_graph([node], "graph", given, found, stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_twin_of_a_product_computes_the_same(bias: bool, zeros: bool, tmp_path: Path) -> None:
    graph = product(tmp_path / "model.onnx", zeros=zeros, bias=bias)
    save_twin(graph, tmp_path / "twin")
    assert computes_as(graph, tmp_path / "twin" / "model.onnx", x=SIZE) == (["MatMul", "Add"] if bias else ["MatMul"])


def test_the_twin_of_experts_computes_the_same(tmp_path: Path) -> None:
    """GPT-OSS: gate and up in one matrix row by row, biases, and limits of the activation.

    With codes of 8 bits, the operator (ONNX Runtime 1.32, CPU) is 1% away from its own matrices.
    """
    rng, experts, inner = np.random.default_rng(5), 3, 32
    arrays: dict[str, np.ndarray] = {}
    for name, rows, columns in (("first", 2 * inner, SIZE), ("second", SIZE, inner)):
        arrays[name] = rng.integers(0, 256, (experts, rows, columns // 2), dtype=np.uint8)
        arrays[f"{name}_scales"] = ((rng.random((experts, rows, columns // BLOCK)) + 0.5) / 16).astype(np.float32)
        arrays[f"{name}_bias"] = rng.standard_normal((experts, rows)).astype(np.float32)
    attributes: dict[str, Any] = {
        "k": 2, "activation_type": "swiglu", "swiglu_fusion": 1, "swiglu_limit": 7.0, "activation_alpha": 1.702,
        "activation_beta": 1.0, "normalize_routing_weights": 1, "expert_weight_bits": 4, "block_size": BLOCK,
    }  # fmt: skip
    inputs = {"x": SIZE, "scores": experts}
    node = helper.make_node("QMoE", [*inputs, *arrays], ["y"], "experts", domain="com.microsoft", **attributes)
    graph = saved(tmp_path / "model.onnx", node, arrays, inputs, SIZE)
    save_twin(graph, tmp_path / "twin")
    assert computes_as(graph, tmp_path / "twin" / "model.onnx", **inputs) == ["MoE"]


def computes_as(graph: Path, twin: Path, **inputs: int) -> list[str]:
    """Require equal outputs; the operators of the twin."""
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal((5, size)).astype(np.float32) for name, size in inputs.items()}
    packed, wide = (
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)[0]
        for path in (graph, twin)
    )
    np.testing.assert_allclose(wide, packed, rtol=1e-4, atol=1e-3)
    return [node.op_type for node in onnx.load(twin).graph.node]
