"""A GGUF file's own codes in a graph: exact for every type, through the main job, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.errors import NblError, RefusalError
from nbl_export.graph.gguf import blocks
from nbl_export.graph.gguf.blocks import block_codes, known_types
from nbl_export.graph.gguf.content import Content, Tensor
from nbl_export.graph.quantised import quantised_matrices
from nbl_export.records.quantised import Blocks
from nbl_export.rewrite import quantize
from nbl_export.rewrite.describe import describe_graph
from nbl_export.rewrite.quantize import TakeCodes, rounded, take_codes

from ..command import TINY, assert_refused, nbl
from ..gguf_kinds import HALVES, every_token, random_blocks, save_mixed
from ..jobs import until

# q, k and v of three forms, which the exporter joins; an embedding with offsets; a head of its own.
MIXED = {"attn_q": "Q4_K", "attn_k": "Q5_0", "attn_v": "Q6_K", "attn_output": "Q4_1", "ffn_gate": "Q5_1",
         "ffn_up": "Q2_K", "ffn_down": "Q3_K", "token_embd": "Q4_K"}  # fmt: skip
# A head that is tied to a 6-bit embedding, and most matrices with offsets, so maps have offsets too.
TIED = {**dict.fromkeys(MIXED, "Q4_1"), "attn_v": "Q5_K", "attn_k": "Q4_0", "token_embd": "Q6_K"}


def tensor(kind: str, stored: np.ndarray) -> Tensor:
    size, width = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    shape = (len(stored), stored.shape[1] // width * size)
    return Tensor("blk.0.ffn_up.weight", shape, GGMLQuantizationType[kind], lambda: stored)


# -- blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", known_types())
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_codes_are_the_tensor_bit_for_bit(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    some = random_blocks(kind, 2, 512, rng)
    wild = rng.integers(0, 256, some.shape, dtype=np.uint8)  # any float16 in the fields, infinities too
    with np.errstate(all="ignore"):
        for stored in (some, wild):
            codes, wanted = block_codes(tensor(kind, stored)), quants.dequantize(stored, GGMLQuantizationType[kind])
            usable = np.isfinite(wanted)
            np.testing.assert_array_equal(codes.values[usable], wanted[usable])
            assert codes.codes.max() < 2**codes.bits and codes.codes.shape == wanted.shape
    assert HALVES.keys() == set(known_types())


def test_an_offset_that_float32_cannot_hold_is_kept_as_it_is() -> None:
    stored = random_blocks("Q4_1", 1, 32, np.random.default_rng(0))
    stored[0, :4] = np.array([1.001, 3e-5], np.float16).view(np.uint8)  # 8 d + m needs 29 bits
    codes = block_codes(tensor("Q4_1", stored))
    assert codes.zeros == 0 and codes.offsets is not None and codes.offsets[0, 0] == np.float32(np.float16(3e-5))
    np.testing.assert_array_equal(codes.values, quants.dequantize(stored, GGMLQuantizationType.Q4_1))
    assert block_codes(tensor("Q4_1", random_blocks("Q4_1", 4, 64, np.random.default_rng(0)))).zeros == 8


def test_an_unknown_type_is_named() -> None:
    stored = quants.quantize(np.ones((1, 32), np.float32), GGMLQuantizationType.Q8_0)
    with pytest.raises(NblError, match=r"blk\.0\.ffn_up\.weight has the type IQ4_NL.*--requantize"):
        block_codes(Tensor("blk.0.ffn_up.weight", (1, 32), GGMLQuantizationType.IQ4_NL, lambda: stored))


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([16, 32]))
@settings(max_examples=25, deadline=None)
def test_rounding_beats_the_span_of_the_block(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.standard_t(3, (8, 4 * size)) / 8).astype(np.float32)
    matrix[0, :size] = 0.25  # a block of equal numbers
    codes = rounded(matrix, 4, size)
    np.testing.assert_allclose(codes.values[0, :size], 0.25, rtol=1e-6)
    assert np.square(codes.values - matrix).sum() < np.square(_by_span(matrix, size) - matrix).sum()


def _by_span(matrix: np.ndarray, size: int) -> np.ndarray:
    blocks = matrix.reshape(len(matrix), -1, size)
    low, high = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    step = np.where(high > low, (high - low) / 15, 1)
    return np.asarray((np.rint((blocks - low) / step) * step + low).reshape(matrix.shape))


# -- graphs ----------------------------------------------------------------------------------------------------


def run_of(kinds: dict[str, str], head: str | None, home: Path, *more: object) -> Path:
    model, text = save_mixed(home / "mixed.gguf", kinds, head), every_token(home / "text.txt", 12_000)
    tokens = ("--calibration-tokens", "4096", "--precision", "int4")
    with until("verify"):
        done = nbl("--model", model, "--calibration", text, *TINY, *tokens, *more, "--output", home / "run")
    assert done.status == 0, done.err
    return home / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"mixed": (MIXED, "Q8_0"), "tied": (TIED, None)}
    return {name: run_of(*given, tmp_path_factory.mktemp(name)) for name, given in made.items()}


def check(run: Path, subject: str, metric: str) -> dict[str, Any]:
    checks = json.loads((run / "verify.json").read_text(encoding="utf-8"))["checks"]
    return next(r for r in checks if (r["subject"], r["metric"]) == (subject, metric))


def nodes(run: Path, which: str, kind: str) -> list[Any]:
    graph = onnx.load(str(run / which / "model.onnx"), load_external_data=False).graph
    return [n for n in graph.node if n.op_type == kind]


@pytest.mark.parametrize("which", ["mixed", "tied"])
def test_int4_of_a_gguf_is_its_own_codes(runs: dict[str, Path], which: str) -> None:
    run = runs[which]
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    assert facts["options"]["precision"] == "gguf" and "--precision gguf" in facts["command"]
    exact = check(run, "original", "steps between a matrix and its codes")
    assert exact["value"] == exact["tolerance"] == 0.0 and exact["passed"]
    floats = [n.name for n in nodes(run, "original", "MatMul") if not n.name.endswith("/offsets")]
    assert floats == [] and not nodes(run, "original", "Gather")[2:]
    assert len(nodes(run, "original", "GatherBlockQuantized")) == 1
    assert len(nodes(run, "original", "Concat")) == 3  # q, k and v of each layer have three forms


def test_offsets_are_no_matrices_of_their_own(runs: dict[str, Path]) -> None:
    facts = describe_graph(runs["tied"] / "original" / "model.onnx")
    assert facts["precision"] == "int4" and "fp32" not in facts["weights"]


def test_one_sum_of_blocks_serves_all_products_of_a_value(runs: dict[str, Path]) -> None:
    sums = nodes(runs["tied"], "original", "ReduceSum")
    offsets = [n for n in nodes(runs["tied"], "original", "MatMul") if n.name.endswith("/offsets")]
    per_layer = {n.name.split("/")[2] for n in offsets if "layers" in n.name}
    assert len(offsets) == 3 * (2 + 1 + 2 + 1) and len(per_layer) == 3  # q + v, o, gate + up, down
    assert len([n for n in sums if n.name.endswith("/block_sums")]) == 3 * 4


def test_maps_have_the_form_of_their_neighbours(runs: dict[str, Path]) -> None:
    ours = {n.name for which in ("MatMulNBits", "MatMul", "Add") for n in nodes(runs["tied"], "model", which)
            if n.name.startswith("/nbl/layers")}  # fmt: skip
    assert any(name.endswith("MatMul_Q4") for name in ours)
    assert any(name.endswith("MatMul_Q4/offsets") for name in ours)
    assert check(runs["tied"], "nbl", "maps in the graph")["passed"]


def test_a_changed_offset_fails_verification(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(runs["tied"], tmp_path / "run"))
    level = ("--precision", "gguf", "--builder-option", "accuracy_level=1")
    done = nbl("rewrite", run, *level)
    assert done.status == 0 and nbl("verify", run).status == 0
    assert check(run, "original", "relative rms logit difference, prefill")["value"] < 1e-5  # nothing is rounded
    written = quantize.add_product_offsets

    def off(graph: Any, product: Any, offsets: np.ndarray, name: str) -> Any:
        wrong = offsets.copy()
        wrong[0, 0] += 0.01 if "layers.1.mlp.down_proj" in name else 0
        return written(graph, product, wrong, name)

    monkeypatch.setattr(quantize, "add_product_offsets", off)
    assert nbl("rewrite", run, "--precision", "gguf", "--builder-option", "accuracy_level=4").status == 0
    refused = nbl("verify", run)
    assert refused.status == 3 and "steps between a matrix and its codes" in refused.err, refused.err


def test_no_float_zero_points_and_no_second_copy_of_a_tied_head(runs: dict[str, Path]) -> None:
    graph = onnx.load(str(runs["tied"] / "original" / "model.onnx"), load_external_data=False).graph
    codes = [t for t in graph.initializer if t.data_type == onnx.TensorProto.UINT8]
    assert [t.name for t in codes if t.dims[0] == 384] == ["lm_head.MatMul.weight_Q8"]
    assert all(len(n.input) < 4 or not n.input[3] for n in nodes(runs["tied"], "original", "MatMulNBits"))


def test_offsets_that_need_the_code_zero_compute_the_same(text: Path, tmp_path: Path) -> None:
    """A scale so large beside its minimum that their sum does not fit into float32."""
    plain = random_blocks("Q4_1", 8, 256, np.random.default_rng(1))
    plain.reshape(-1, 20)[0, :4] = np.array([1.001, 3e-5], np.float16).view(np.uint8)
    held = tensor("Q4_1", plain)
    index = blocks.RowIndex(Content("llama", {}, (held,)))
    model = _product(held.values())
    TakeCodes(index, accuracy=1)(model)
    ir.save(model, tmp_path / "one.onnx")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).standard_normal((1, 3, 256)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ held.values().T, atol=2e-4)
    ((node, matrix),) = quantised_matrices(model.graph).items()
    np.testing.assert_array_equal(matrix.blocks().values, held.values())
    assert len(node.inputs) == 4


def test_rows_that_two_tensors_share_come_from_the_matrix_itself() -> None:
    """Rows of zeros, as of unused tokens: in the embedding and in a head of another type."""
    rng = np.random.default_rng(4)
    held = []
    for name, kind in (("output.weight", "Q5_K"), ("token_embd.weight", "Q4_K")):
        stored = random_blocks(kind, 8, 256, rng)
        stored[3:5] = 0
        rows = tensor(kind, stored)
        held.append(Tensor(name, rows.shape, rows.kind, rows.read))
    index = blocks.RowIndex(Content("llama", {}, tuple(held)))
    for one, bits in zip(held, (8, 4), strict=True):
        parts = index.codes_of(one.values())
        assert parts is not None and [part.bits for part in parts] == [bits]
        np.testing.assert_array_equal(parts[0].values, one.values())


def _product(matrix_NK: np.ndarray) -> ir.Model:
    """A graph of one MatMul."""
    f32 = ir.TensorType(ir.DataType.FLOAT)
    rows, columns = matrix_NK.shape
    x = ir.Value(name="x", shape=ir.Shape(["B", "T", columns]), type=f32)
    constant = ir.tensor(np.ascontiguousarray(matrix_NK.T), name="w")
    weight = ir.Value(name="w", const_value=constant, shape=ir.Shape([columns, rows]), type=f32)
    node = ir.node("MatMul", [x, weight], name="/product")
    node.outputs[0].name, node.outputs[0].type = "y", f32
    node.outputs[0].shape = ir.Shape(["B", "T", rows])
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports=opsets, name="one")
    return ir.Model(graph, ir_version=10)


# -- refusals --------------------------------------------------------------------------------------------------


def test_a_matrix_that_the_file_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    held = tensor("Q4_0", random_blocks("Q4_0", 8, 64, np.random.default_rng(1)))
    index = blocks.RowIndex(Content("llama", {}, (held,)))
    with pytest.raises(RefusalError, match=r"w of /product has rows that are not in the GGUF"):
        TakeCodes(index).call(_product(held.values() + np.float32(1e-3)))

    def off_by_one(found: Tensor) -> Blocks:
        right = block_codes(found)
        return dataclasses.replace(right, codes=right.codes ^ 1)

    index = blocks.RowIndex(Content("llama", {}, (held,)))
    monkeypatch.setattr(index, "_codes", lambda _: off_by_one(held))
    with pytest.raises(RefusalError, match="not in the GGUF"):
        TakeCodes(index).call(_product(held.values()))


def test_a_file_of_floats_has_no_codes(exported: Callable[..., Path], tmp_path: Path) -> None:
    model = save_mixed(tmp_path / "float.gguf", dict.fromkeys(MIXED, "F32"))
    from nbl_export.model.checkpoint import load, source

    checkpoint = load.materialise(source.resolve(str(model)), tmp_path / "checkpoint")
    from tests.exports import build_decoder

    build_decoder("genai", checkpoint, tmp_path / "wide", "fp32")
    with pytest.raises(NblError, match=r"float\.gguf stores its matrices as floats"):
        take_codes(tmp_path / "wide" / "model.onnx", model, tmp_path)


def test_what_does_not_fit_a_gguf_is_refused(text: Path, tmp_path: Path) -> None:
    model = save_mixed(tmp_path / "mixed.gguf", TIED)
    words = ("--precision", "int4", "--builder-option", "algo_config=rtn", "--output", tmp_path / "run")
    refused = nbl("--model", model, "--calibration", text, *TINY, *words)
    assert_refused(refused, 2, "algo_config=rtn", "--requantize")
    assert not (tmp_path / "run").exists()


def test_an_unknown_type_is_refused_before_any_work(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setitem(HALVES, "IQ4_NL", {0: 1.5e-3})
    model = save_mixed(tmp_path / "iq.gguf", {**TIED, "ffn_up": "IQ4_NL"})
    given = ("--model", model, "--calibration", text, *TINY, "--precision", "int4", "--output", tmp_path / "run")
    assert_refused(nbl(*given), 1, "blk.0.ffn_up.weight", "IQ4_NL", "--requantize")
    assert not (tmp_path / "run").exists()


def test_old_rounding_stays_on_request(tmp_path: Path) -> None:
    run = run_of(TIED, None, tmp_path, "--requantize")
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    assert facts["options"]["precision"] == "int4" and "--requantize" in facts["command"].split()
    assert check(run, "original", "steps between a matrix and its codes")["value"] > 0
    again = nbl("rewrite", run, "--precision", "gguf")
    assert again.status == 0, again.err
    assert json.loads((run / "nbl.json").read_text(encoding="utf-8"))["options"]["precision"] == "gguf"


def test_one_part_of_a_split_file_is_refused(text: Path, tmp_path: Path) -> None:
    import gguf

    model = save_mixed(tmp_path / "plain.gguf", TIED)
    reader, part = gguf.GGUFReader(model), tmp_path / "part-00001-of-00002.gguf"
    writer = gguf.GGUFWriter(part, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    writer.add_uint16("split.count", 2)
    for found in reader.tensors[:-3]:
        writer.add_tensor(found.name, found.data, raw_dtype=found.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = ("--model", part, "--calibration", text, *TINY, "--precision", "int4", "--output", tmp_path / "run")
    assert_refused(nbl(*given), 1, part.name, "one of 2 parts", "--merge")
    assert not (tmp_path / "run").exists()
