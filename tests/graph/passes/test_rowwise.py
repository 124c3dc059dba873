"""Products with int8 rows: the numbers of both forms, the balance, and a decoder that is converted."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.passes.rowwise import MakeRowwise
from nbl_export.graph.rowwise import NAME, make_exact, session_entries
from nbl_export.graph.session import open_session
from nbl_export.targets.base import ExportSettings
from nbl_export.targets.onnx import export_genai
from nbl_export.targets.onnx.int8_rows import round_rows

K, N, BLOCK = 64, 48, 32
RNG = np.random.default_rng(3)
CODES = RNG.integers(1, 256, (N, K // BLOCK, BLOCK)).astype(np.uint8)
SCALES = RNG.uniform(0.5, 1.5, (N, K // BLOCK)).astype(np.float32) / 127
MATRIX_KN = ((CODES.astype(np.float32) - 128) * SCALES[:, :, None]).reshape(N, K).T
X = (RNG.standard_normal((2, 5, K)) * np.geomspace(0.01, 10, K)).astype(np.float32)


def product(*, again: bool = False) -> ir.Model:
    """y = MatMulNBits(x), and z of the same x; `again`: a third product reads the codes of the first."""
    x = ir.val("x", ir.DataType.FLOAT, ["B", "T", K])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1})
    stored: dict[str, list[ir.Value]] = {}
    for name in ("y", "z", *(("w",) if again else ())):
        if name != "w":
            tensors = (ir.tensor(CODES, name=f"{name}.codes"), ir.tensor(SCALES, name=f"{name}.scales"))
            stored[name] = [ir.val(str(tensor.name), const_value=tensor) for tensor in tensors]
            for value in stored[name]:
                graph.register_initializer(value)
        sizes = {"K": K, "N": N, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
        output = ir.val(name, ir.DataType.FLOAT, ["B", "T", N])
        codes = stored.get(name, stored["y"])
        graph.append(ir.node("MatMulNBits", [x, *codes], sizes, domain="com.microsoft", outputs=[output], name=name))
        graph.outputs.append(output)
    return ir.Model(graph, ir_version=10)


def rowwise(moment_K: np.ndarray | None = None) -> onnx.ModelProto:
    model = product()
    run_passes([MakeRowwise({} if moment_K is None else {"x": moment_K})], model)
    return ir.to_proto(model)


def answer(proto: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["y"], {"x": x})[0]
    return found


def stored(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return np.asarray(onnx.numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == name)))


def error(moment_K: np.ndarray | None) -> float:
    return float(np.square(answer(rowwise(moment_K)) - X @ MATRIX_KN).mean())


@pytest.mark.parametrize("moment_K", [None, np.square(X).mean((0, 1))], ids=["not balanced", "balanced"])
def test_the_exact_form_is_the_product_with_the_codes_that_ship(moment_K: np.ndarray | None) -> None:
    proto = rowwise(moment_K)
    codes, scales, inverse = (stored(proto, name) for name in ("y/codes", "y/scales", "x/inverse"))
    session = open_session(proto.SerializeToString(), fp32_activations=True)
    matrix_KN = inverse[:, None] * codes * scales
    np.testing.assert_allclose(session.run(["y"], {"x": X})[0], X @ matrix_KN, rtol=1e-4, atol=1e-4)
    assert [tensor.name for tensor in make_exact(proto)] == ["y/codes", "z/codes"]
    assert (np.abs(matrix_KN - MATRIX_KN) <= inverse[:, None] * scales / 2 + 1e-6).all()


def test_the_form_that_ships_rounds_each_token_by_its_own_largest_value() -> None:
    proto = rowwise()
    codes, scales = (stored(proto, name).astype(np.float64) for name in ("y/codes", "y/scales"))
    step = np.abs(X).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(answer(proto), np.rint(X / step) * step @ (codes * scales), rtol=1e-3, atol=2e-2)


def test_a_token_alone_and_beside_others_has_the_same_numbers_and_a_row_of_zeros_gives_zeros() -> None:
    proto = rowwise(np.square(X).mean((0, 1)))
    whole = answer(proto)
    for row in range(X.shape[0]):
        for token in range(X.shape[1]):
            alone = answer(proto, X[row : row + 1, token : token + 1])
            np.testing.assert_allclose(alone[0, 0], whole[row, token], rtol=1e-5, atol=1e-5)
    assert not answer(proto, np.zeros_like(X)).any()


def test_the_balance_by_moments_loses_least() -> None:
    moment_K = np.square(X).mean((0, 1))
    assert error(moment_K) < 0.5 * error(None)
    assert error(moment_K) < 0.5 * error(moment_K**3)
    assert error(moment_K) < 0.5 * error(1 / moment_K)


def test_channels_of_which_nothing_is_known_are_not_balanced() -> None:
    moment_K = np.zeros(K)
    moment_K[3] = 4.0
    np.testing.assert_array_equal(stored(rowwise(moment_K), "x/inverse"), np.ones(K, np.float32))


def test_codes_that_two_products_read_stay() -> None:
    model = product(again=True)
    run_passes([MakeRowwise({})], model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits", NAME, "MatMulNBits"]


@pytest.fixture
def folder(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny decoder in int8, as a job exports it."""
    return Path(shutil.copytree(exported("llama", "genai", "int8"), tmp_path / "int8"))


def test_a_decoder_has_rows_in_every_product_but_the_head(folder: Path) -> None:
    graph = onnx.load(str(folder / GRAPH_FILE), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMulNBits"] == 1
    assert kinds[NAME] % 5 == 0  # qkv, o, gate, up, down of each layer


@pytest.mark.parametrize(
    ("machine", "flags", "unsigned"),
    [("x86_64", "avx2", True), ("x86_64", "avx2 avx512_vnni", False), ("AMD64", None, True), ("aarch64", "sve", False)],
)
def test_products_are_unsigned_where_they_would_saturate(
    machine: str, flags: str | None, unsigned: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, encoding: str) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return flags

    monkeypatch.setattr("platform.machine", lambda: machine)
    proto = rowwise()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", read)
        assert session_entries(proto) == ({"session.x64quantprecision": "1"} if unsigned else {})
        assert session_entries(ir.to_proto(product())) == {}


def test_a_folder_made_where_products_saturate_says_so(
    folder: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.graph.rowwise._saturates", lambda: True)
    round_rows(folder, np.zeros((1, 4), np.int64))
    settings = read_genai_config(folder)["model"]["decoder"]["session_options"]
    assert settings["session.x64quantprecision"] == "1"


def test_the_balance_is_that_of_all_rows_of_the_text(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    export_genai.build(checkpoint("llama"), tmp_path, ExportSettings("genai", "int8"))
    proto = onnx.load(str(tmp_path / GRAPH_FILE))
    first = next(node for node in proto.graph.node if node.op_type == "MatMulNBits")
    shown = onnx.ModelProto.FromString(proto.SerializeToString())
    shown.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], onnx.TensorProto.FLOAT, None))
    decoder = OnnxDecoder(tmp_path, 16, session=open_session(shown.SerializeToString()))
    rows_BT = np.random.default_rng(1).integers(0, 64, (3, 20))
    decoder.begin(3)
    moment_K = np.square(decoder.run(rows_BT)[first.input[0]]).sum((0, 1))
    sizes = {attribute.name: attribute.i for attribute in first.attribute}
    codes = stored(proto, first.input[1]).reshape(sizes["N"], -1, sizes["block_size"]).astype(np.float32) - 128
    matrix_NK = (codes * stored(proto, first.input[2]).reshape(sizes["N"], -1, 1)).reshape(sizes["N"], -1)

    round_rows(tmp_path, rows_BT)
    inverse_K = stored(onnx.load(str(tmp_path / GRAPH_FILE)), f"{first.input[0]}/inverse")
    balance_K = (moment_K / np.square(matrix_NK[:, : sizes["K"]]).sum(0)) ** 0.25
    np.testing.assert_allclose(1 / inverse_K, balance_K / np.sqrt(np.square(balance_K).mean()), rtol=1e-2)


def test_the_balance_of_down_is_in_the_scales_of_up(folder: Path) -> None:
    proto = onnx.load(str(folder / GRAPH_FILE))
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    shapes = {node.name: list(stored[node.input[1]].dims) for node in proto.graph.node if node.op_type == NAME}
    assert {name: not shape for name, shape in shapes.items()} == {name: "down_proj" in name for name in shapes}


def test_a_decoder_of_mobius_has_rows_in_every_product(exported: Callable[..., Path]) -> None:
    logits = {}
    ids = np.random.default_rng(0).integers(0, 64, (1, 24))
    for precision in ("int8", "fp32"):
        decoder = OnnxDecoder(exported("llama", "mobius", precision), 16)
        decoder.begin(1)
        logits[precision] = decoder.step(ids)
    graph = onnx.load(str(exported("llama", "mobius", "int8") / GRAPH_FILE), load_external_data=False).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["MatMul"] == 0 and kinds[NAME] > 0
    assert (logits["int8"] - logits["fp32"]).std() < 0.05 * logits["fp32"].std()


def test_products_of_one_input_round_it_once(folder: Path, tmp_path: Path) -> None:
    options: Any = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(folder / GRAPH_FILE), options, providers=["CPUExecutionProvider"])
    optimised = onnx.load(options.optimized_model_filepath, load_external_data=False)
    kinds = Counter(node.op_type for node in optimised.graph.node)
    assert kinds["QuantizeLinear"] * 5 == kinds["MatMulIntegerToFloat"] * 4  # gate and up share one


def test_logits_follow_the_float_graph_and_do_not_depend_on_padding(
    folder: Path, exported: Callable[..., Path]
) -> None:
    ids = np.random.default_rng(0).integers(0, 64, (1, 24))
    logits = {}
    for name, directory in (("int8", folder), ("fp32", exported("llama", "genai", "fp32"))):
        decoder = OnnxDecoder(directory, 16)
        decoder.begin(1)
        logits[name] = decoder.step(ids)
    decoder = OnnxDecoder(folder, 16)
    decoder.begin(2)
    batch = decoder.step(np.concatenate([ids, ids[:, ::-1]]))
    np.testing.assert_allclose(batch[:1], logits["int8"], rtol=1e-4, atol=1e-4)
    wrong = logits["int8"] - logits["fp32"]
    assert wrong.std() < 0.05 * logits["fp32"].std()


def test_a_second_conversion_changes_nothing(folder: Path) -> None:
    before = (folder / GRAPH_FILE).read_bytes()
    names = sorted(path.name for path in folder.iterdir())
    round_rows(folder, np.zeros((1, 4), np.int64))
    assert (folder / GRAPH_FILE).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == names
