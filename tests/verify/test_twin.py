"""A quantised graph is proven through its float32 twin: right ones pass, and each planted fault is named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.options.options import JobOptions
from nbl_export.rewrite.widen import Widen, save_twin
from nbl_export.run.progress import Ui
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages import verify
from nbl_export.run.stages.common import Place
from nbl_export.run_directory import RunDirectory
from nbl_export.verify.ladder import TOLERANCES, run_rows

from ..command import TINY, nbl
from ..jobs import until
from ..tiny import HEAD_DIM, HIDDEN, VOCAB

Runs = Callable[..., Path]
EXACT = 2e-5  # of two float32 engines on a tiny model; 1e-3 is the gate


@pytest.fixture(scope="module")
def runs(checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """architecture, precision, layers, tap, last stage -> a run whose graph has all logits. Never write to it."""

    @functools.cache
    def make(
        architecture: str, precision: str, layers: str = "1,2", tap: str = "residual", last: str = "rewrite"
    ) -> Path:
        out = tmp_path_factory.mktemp("coded") / "run"
        with until(last):
            done = nbl("--model", checkpoint(architecture), "--calibration", text, *TINY, "--precision", precision,
                       "--layers", layers, "--tap", tap, "--logits", "all", "--output", out)  # fmt: skip
        assert done.status == 0, done.err
        return out

    return make


def climbed(run: Path) -> list[dict[str, Any]]:
    """The checks of a run directory as it is now; the quality loss, which is not gated, is left out."""
    with RunDirectory.open_run(run, create=False) as opened, mock.patch.object(verify, "quality_loss", return_value=[]):
        resolver = Resolver(JobOptions.from_json(opened.manifest["options"]), opened, Ui(quiet=True))
        place = Place(opened, resolver.ui)
        found: list[dict[str, Any]] = verify.check(verify.declare(resolver), place, run)["checks"]
        return found


def named(checks: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Check, subject and metric of what failed."""
    return {(r["check"], r["subject"], r["metric"]) for r in checks if not r["passed"]}


def on_logits(checks: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [r for r in checks if r["check"] == check and "logit" in r["metric"]]


@pytest.mark.parametrize(
    ("architecture", "layers", "precision"),
    [("llama", "0,2", "int4"), pytest.param("llama", "0,2", "int8", marks=pytest.mark.fuzz),
     pytest.param("mistral-window", "1,2", "int4", marks=pytest.mark.fuzz), ("qwen2", "1,2", "int8"),
     ("gemma3", "0,2", "int4")],  # 0: a table of tokens, too
)  # fmt: skip
def test_wiring_is_proven_to_float32_accuracy(architecture: str, precision: str, layers: str, runs: Runs) -> None:
    run = runs(architecture, precision, layers, last="report")
    checks = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
    for check in ("original", "nbl"):
        seen = on_logits(checks, check)
        assert {r["tolerance"] for r in seen} == {TOLERANCES["fp32"].limit}
        assert any("chunks of 512" in r["detail"] for r in seen)
        assert max(r["value"] for r in seen) < EXACT
    assert max(r["value"] for r in on_logits(checks, "quantised")) < TOLERANCES[precision].limit
    said = json.loads((run / "verify.json").read_text(encoding="utf-8"))["proof"]
    largest = max(r["value"] for r in on_logits(checks, "nbl"))
    assert f"{largest:.1e} in any logit" in said[0] and len(said) == 4
    assert all(sentence in (run / "report.md").read_text(encoding="utf-8") for sentence in said)


# -- faults: each changes the graph that ships, and a check of this name must see it --------------------------

Fault = Callable[[ir.Model], None]
WIRING = ("nbl", "nbl", "max abs logit difference, prefill")


def product(model: ir.Model, layer: int) -> ir.Node:
    return next(n for n in model.graph if (n.name or "").startswith(f"/nbl/layers.{layer}/MatMul"))


def exchange_maps(model: ir.Model) -> None:
    one, two = product(model, 1), product(model, 2)
    for k in range(1, len(one.inputs)):
        first, second = one.inputs[k], two.inputs[k]
        one.replace_input_with(k, second)
        two.replace_input_with(k, first)


def another_norm(model: ir.Model) -> None:
    """The map of layer 2 acts on what the norm of layer 1 gives."""
    product(model, 2).replace_input_with(0, product(model, 1).inputs[0])


def lose_residual(model: ir.Model) -> None:
    added = next(n for n in model.graph if (n.name or "").startswith("/nbl/layers.1/Add")).outputs[0]
    join = next(iter(added.consumers()))
    join.replace_input_with(1 - list(join.inputs).index(added), added)


def another_rope_base(model: ir.Model) -> None:
    """Of a table of cosines and sines [positions, half a head] with ten times the base."""
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        value = next(v for v in model.graph.initializers.values() if name in str(v.name))
        positions, half = value.const_value.numpy().shape  # type: ignore[union-attr]
        angles = np.arange(positions)[:, None] * 100_000.0 ** -(np.arange(half) / half)[None]
        value.const_value = ir.tensor(function(angles).astype(np.float32), name=value.name)


def window_off_by_one(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.attributes.get_int("local_window_size", -1) > 0)
    node.attributes["local_window_size"] = ir.AttrInt64(
        "local_window_size", node.attributes["local_window_size"].as_int() + 1
    )


def lose_a_scale(model: ir.Model) -> None:
    """One block of one row, of a matrix that is not a map."""
    name = "model.layers.1.mlp.down_proj.MatMul.weight_scale"
    value = model.graph.initializers[name]
    scales = value.const_value.numpy().copy()  # type: ignore[union-attr]
    scales.reshape(HIDDEN, -1)[40, 1] = 0
    value.const_value = ir.tensor(scales, name=name)


FAULTS: dict[str, tuple[Fault, str, str, tuple[str, str, str]]] = {
    "maps of two layers exchanged": (exchange_maps, "llama", "residual", WIRING),
    "a map on the norm of another layer": (another_norm, "llama", "normed", WIRING),
    "a lost residual": (lose_residual, "qwen2", "residual", WIRING),
    "a rope table of another base": (another_rope_base, "llama", "residual", WIRING),
    "a window off by one": (window_off_by_one, "mistral-window", "residual", WIRING),
    "a scale lost in one block row": (
        lose_a_scale, "llama", "residual", ("structure", "original", "steps between a matrix and its codes")
    ),
}  # fmt: skip


OTHER_PRECISION = pytest.param(next(iter(FAULTS)), "int8", marks=pytest.mark.fuzz)


@pytest.mark.parametrize(("fault", "precision"), [*((fault, "int4") for fault in FAULTS), OTHER_PRECISION])
def test_a_planted_fault_is_named(fault: str, precision: str, runs: Runs, tmp_path: Path) -> None:
    plant, architecture, tap, check = FAULTS[fault]
    run = Path(shutil.copytree(runs(architecture, precision, "1,2", tap), tmp_path / "run"))
    for which in ("original", "model"):
        if which == "model" or check[1] == "original":
            path = run / which / "model.onnx"
            model = ir.load(path)
            plant(model)
            ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
            shutil.copyfile(tmp_path / "model.onnx", path)
            shutil.copyfile(tmp_path / "model.onnx.data", f"{path}.data")
    checks = climbed(run)
    assert check in named(checks)
    if check == WIRING:  # what the noise of the codes would have let pass
        assert not any(r["check"] == "original" and not r["passed"] for r in checks)
    else:
        (seen,) = [r for r in checks if (r["check"], r["subject"], r["metric"]) == check]
        assert "/model/layers.1/mlp/down_proj" in seen["detail"] and "row 40" in seen["detail"]


def test_a_kernel_that_multiplies_by_something_else_is_named(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code of one row that is a step off."""
    from nbl_export.verify import codes

    run, real = runs("llama", "int4"), codes.products

    def wrong(graph: Path, threads: int | None = None) -> Any:
        for name, given, output in real(graph, threads):
            if "layers.2/mlp/up_proj" in name:
                output = output.copy()
                output[..., 7] += 1e-2 * np.abs(output).max()
            yield name, given, output

    monkeypatch.setattr(codes, "products", wrong)
    checks = climbed(run)
    failed = [r for r in checks if not r["passed"]]
    assert {r["metric"] for r in failed} == {"error of quantised products, of the sum of magnitudes"}
    assert all("layers.2/mlp/up_proj" in r["detail"] for r in failed)


def test_matrices_of_another_model_are_named(runs: Runs, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs("llama", "int8"), tmp_path / "run"))
    for which in ("original", "model"):
        model = ir.load(run / which / "model.onnx")
        value = model.graph.initializers["model.layers.0.mlp.up_proj.MatMul.weight_Q8"]
        codes = value.const_value.numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(np.roll(codes, 1, 0), name=value.name)
        ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
        for suffix in ("", ".data"):
            shutil.copyfile(tmp_path / f"model.onnx{suffix}", run / which / f"model.onnx{suffix}")
    checks = climbed(run)
    (seen,) = [r for r in checks if r["metric"] == "quantised matrices are the model's"]
    assert not seen["passed"] and "/model/layers.0/mlp/up_proj" in seen["detail"]


# -- the twin itself -----------------------------------------------------------------------------------------


def written(model: ir.Model, x: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # fused products round activations
    graph = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def value(name: str, *shape: Any, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


@pytest.mark.parametrize(
    ("axis", "block", "scales"), [(0, 32, (2, 48)), (1, 16, (64, 3)), (1, 0, (48,)), (0, 0, (64,)), (0, 0, ())]
)
@pytest.mark.parametrize("zero", [False, True])
def test_a_dequantised_product_keeps_what_it_computes(
    axis: int, block: int, scales: tuple[int, ...], zero: bool
) -> None:
    """Held to ONNX Runtime's own DequantizeLinear, in every form that operator has."""
    random = np.random.default_rng(0)
    constants = {"codes": random.integers(-127, 127, (64, 48)).astype(np.int8),
                 "scales": random.random(scales).astype(np.float32) + 0.1}  # fmt: skip
    if zero:
        constants["zeros"] = random.integers(-9, 9, scales).astype(np.int8)
    inputs = [value(name, *np.shape(c)) for name, c in constants.items()]
    x = value("x", "n", 64)
    attributes = {"axis": axis, "block_size": block} if block else {"axis": axis}
    dequantize = ir.node("DequantizeLinear", inputs, attributes, name="wide")
    multiply = ir.node("MatMul", [x, dequantize.outputs[0]], name="product")
    multiply.outputs[0].name = "y"
    multiply.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph_values = {v.name: v for v in inputs}
    for name, constant in constants.items():
        tensor = ir.tensor(constant, name=name)
        graph_values[name].const_value, graph_values[name].type = tensor, ir.TensorType(tensor.dtype)
    graph = ir.Graph([x], multiply.outputs, nodes=[dequantize, multiply], initializers=inputs, opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    given = random.standard_normal((5, 64)).astype(np.float32)
    before = written(model, given)
    assert Widen()(model).modified
    assert [n.op_type for n in model.graph] == ["MatMul"]
    np.testing.assert_allclose(written(model, given), before, rtol=1e-5, atol=1e-3)


def test_a_dynamically_quantised_product_loses_its_rounding_only() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 48)).astype(np.float32)
    scale = np.float32(np.abs(weight).max() / 127)
    x = value("x", "n", 64)
    names = {"codes": np.rint(weight / scale).astype(np.int8), "zero": np.int8(0), "scale": scale}
    constants = {}
    for name, array in names.items():
        tensor = ir.tensor(np.asarray(array), name=name)
        shape = ir.Shape(tensor.shape.numpy())
        constants[name] = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name="quantize")
    codes, step, zero = quantize.outputs
    integer = ir.node("MatMulInteger", [codes, constants["codes"], zero, constants["zero"]], name="product")
    cast = ir.node("Cast", integer.outputs, {"to": int(ir.DataType.FLOAT)}, name="cast")
    both = ir.node("Mul", [step, constants["scale"]], name="both")
    scaled = ir.node("Mul", [cast.outputs[0], both.outputs[0]], name="scaled")
    scaled.outputs[0].name = "y"
    scaled.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    nodes = [quantize, integer, cast, both, scaled]
    graph = ir.Graph([x], scaled.outputs, nodes=nodes, initializers=list(constants.values()), opset_imports={"": 21})
    model = ir.Model(graph, ir_version=10)
    given = random.standard_normal((5, 64)).astype(np.float32)
    before = written(model, given)
    assert Widen()(model).modified
    after = written(model, given)
    np.testing.assert_allclose(after, given @ (names["codes"].astype(np.float32) * scale), rtol=1e-5, atol=1e-4)
    assert 1e-4 < np.abs(after - before).max() < 0.2


def test_a_graph_without_codes_is_left_alone(exported: Callable[..., Path]) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not Widen()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_twin_is_the_same_graph_but_for_its_products(
    precision: str, exported: Callable[..., Path], tmp_path: Path
) -> None:
    source = exported("llama", "genai", precision) / "model.onnx"
    save_twin(source, tmp_path / "twin")
    before, after = ir.load(source), ir.load(tmp_path / "twin" / "model.onnx")
    changed = {"MatMulNBits": "MatMul", "GatherBlockQuantized": "Gather"}
    plumbing = ("Reshape", "Constant")  # of codes that a head and its embedding share
    was = [(changed.get(n.op_type, n.op_type), n.outputs[0].name) for n in before.graph if n.op_type not in plumbing]
    now = [(n.op_type, n.outputs[0].name) for n in after.graph if n.op_type not in plumbing]
    assert now == was
    rows = [np.random.default_rng(0).integers(2, VOCAB, 40).tolist()]
    far = (
        run_rows(OnnxDecoder(source.parent, HEAD_DIM), rows)[0]
        - run_rows(OnnxDecoder(tmp_path / "twin", HEAD_DIM), rows)[0]
    )
    assert 0 < np.abs(far).max() < 0.2


def test_an_operator_without_a_float32_form_is_refused() -> None:
    node = ir.node("MatMulBnb4", [value("x", "n", 4)], name="odd", domain="com.microsoft")
    node.outputs[0].name = "y"
    graph = ir.Graph([v for v in node.inputs if v is not None], node.outputs, nodes=[node], opset_imports={"": 21})
    with pytest.raises(RefusalError, match="MatMulBnb4"):
        Widen()(ir.Model(graph, ir_version=10))
