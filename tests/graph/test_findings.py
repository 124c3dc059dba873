"""What makes a decoder slow at reading prompts, each trait planted once, and what `inspect` says of damaged folders."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nbl_export.graph.names import IR_FILE, IR_WEIGHTS

from ..command import assert_refused, nbl
from ..tiny import LAYERS

Exported = Callable[..., Path]
_PRODUCTS = 5 * LAYERS + 1  # of the GenAI builder, with query, key and value in one


def findings(path: Path) -> dict[str, int]:
    """The first words of each finding, and its number of nodes."""
    done = nbl("inspect", path, "--json")
    assert done.status == 0, done.err
    found = json.loads(done.out)["findings"]
    assert all(finding["advice"] for finding in found)
    return {" ".join(finding["what"].split()[:2]): finding["nodes"] for finding in found}


# -- ONNX --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quantised(exported: Exported, tmp_path: Path) -> Path:
    """A copy of a tiny GenAI folder in int4 that reads prompts as fast as it can."""
    from nbl_export.targets.onnx.engine import ORT

    copy = Path(shutil.copytree(exported("llama", "genai", "int4"), tmp_path / "graph"))
    ORT.keep_last_token(copy)
    each_product(copy, block_size=128)
    return copy


def each_product(directory: Path, **attributes: int) -> None:
    """Set attributes of every MatMulNBits; what the graph then computes is never asked."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name in attributes:
                attribute.i = attributes[attribute.name]
    onnx.save(model, directory / "model.onnx")


def test_a_quick_graph_has_no_finding(quantised: Path) -> None:
    assert findings(quantised) == {}
    assert "Nothing found that slows prefill" in nbl("inspect", quantised).out


def test_products_of_float_activations(quantised: Path) -> None:
    each_product(quantised, accuracy_level=0)
    assert findings(quantised) == {"MatMulNBits multiplies": _PRODUCTS}
    table = " ".join(nbl("inspect", quantised).out.split())
    assert "set accuracy_level to 4" in table


def test_small_blocks(quantised: Path) -> None:
    each_product(quantised, block_size=64)
    assert findings(quantised) == {"blocks are": _PRODUCTS}


def test_the_head_of_all_tokens(quantised: Path) -> None:
    """Also if the shape of the logits leaves their number open."""
    from nbl_export.graph.names import ALL_LOGITS_FILE

    assert findings(quantised / ALL_LOGITS_FILE)["the head"] == 1
    model = onnx.load(quantised / "model.onnx", load_external_data=False)
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "number_of_logits"
    onnx.save(model, quantised / "model.onnx")
    assert "the head" not in findings(quantised)


def test_attention_in_single_operators(given_graph: Callable[[str], Path]) -> None:
    found = findings(given_graph("torchscript"))
    assert found == {"the head": 1, "attention is": LAYERS, "weights are": 7 * LAYERS + 1}


def test_what_is_attention(exported: Exported, tmp_path: Path) -> None:
    """Not a router of experts, which multiplies by weights, and not nodes of the rewrite, which attend few queries."""
    from nbl_export.graph.names import OWN_NODES

    model = onnx.load(exported("llama") / "model.onnx")
    router = np.ones((7, 4), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(router, "router"))
    for number, (one, other) in enumerate((("logits", "logits"), ("weights0", "router"), ("weights0", "weights0"))):
        name = f"{OWN_NODES}Softmax" if number == 2 else f"Softmax{number}"
        scores = onnx.helper.make_node("MatMul", [one, other], [f"scores{number}"])
        softmax = onnx.helper.make_node("Softmax", [f"scores{number}"], [f"weights{number}"], name=name)
        model.graph.node.extend((scores, softmax))
    onnx.save(model, tmp_path / "model.onnx")
    assert findings(tmp_path)["attention is"] == 1


def test_weights_behind_a_dequantisation_are_quantised(exported: Exported, tmp_path: Path) -> None:
    from onnx import helper, numpy_helper

    model = onnx.load(exported("llama") / "model.onnx")
    assert "weights are" in findings(exported("llama"))
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    matrix = next(tensor for tensor in model.graph.initializer if tensor.name == product.input[1])
    codes = np.ones(list(matrix.dims), np.int8)
    model.graph.initializer.append(numpy_helper.from_array(codes, "codes"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "scale"))
    product.input[1] = "wide"
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["codes", "scale"], ["wide"]))
    onnx.save(model, tmp_path / "model.onnx")
    assert "weights are" not in findings(tmp_path)


def test_traits_of_a_cpu_are_not_told_of_a_gpu(quantised: Path) -> None:
    each_product(quantised, accuracy_level=0, block_size=32)
    settings = json.loads((quantised / "genai_config.json").read_text())
    settings["model"]["decoder"]["session_options"]["provider_options"] = [{"cuda": {}}]
    (quantised / "genai_config.json").write_text(json.dumps(settings))
    assert findings(quantised) == {}
    assert findings(quantised / "all_logits.onnx") == {"the head": 1}


# -- IR ----------------------------------------------------------------------------------------------------------

_OPTION = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


def with_option(source: Path, out: Path, size: str | None) -> Path:
    """A copy of an IR that names a group of activations, or none."""
    copy = Path(shutil.copytree(source, out))
    lines = (copy / IR_FILE).read_text(encoding="utf-8").splitlines(keepends=True)
    named = [number for number, line in enumerate(lines) if f"<{_OPTION}" in line]
    assert len(named) == 1
    lines[named[0]] = "" if size is None else f'<{_OPTION} value="{size}" />\n'
    (copy / IR_FILE).write_text("".join(lines), encoding="utf-8")
    return copy


@pytest.mark.engine
def test_a_quick_ir_has_no_finding(exported_ir: Exported) -> None:
    directory = exported_ir("llama", "int8")
    assert findings(directory) == {}
    assert "Nothing found that slows prefill" in nbl("inspect", directory).out


@pytest.mark.engine
@pytest.mark.parametrize(
    ("size", "found"),
    [
        (None, {"activations are"}),
        ("32", {"activations are"}),
        ("0", {"activations stay"}),
        ("128", set()),
        ("x", {"activations are"}),
    ],
)
def test_groups_of_activations(size: str | None, found: set[str], exported_ir: Exported, tmp_path: Path) -> None:
    said = findings(with_option(exported_ir("llama", "int8"), tmp_path / "ir", size))
    assert said == dict.fromkeys(found, 7 * LAYERS + 1)


@pytest.mark.engine
def test_small_groups_of_weights(exported_ir: Exported, tmp_path: Path) -> None:
    """The head has one scale an output, so that any group of activations suits it."""
    source = exported_ir("llama", "int4")
    small = {"groups are": 7 * LAYERS}
    assert findings(source) == small
    assert findings(with_option(source, tmp_path / "32", "32")) == small
    assert findings(with_option(source, tmp_path / "128", "128")) == {**small, "activations stay": 7 * LAYERS}


@pytest.mark.engine
def test_an_ir_of_floats_with_all_logits(exported: Exported) -> None:
    assert findings(exported("llama", "openvino", "fp16")) == {"the head": 1, "weights are": 7 * LAYERS + 1}


@pytest.mark.engine
@pytest.mark.parametrize(("architecture", "recognised"), [("llama", True), ("granite", False), ("gemma2", True)])
def test_the_head_that_genai_cuts(architecture: str, recognised: bool, exported: Exported) -> None:
    """Granite divides its logits, which is none of the forms that GenAI looks for; Gemma 2 caps them."""
    found = json.loads(nbl("inspect", exported(architecture, "openvino", "fp32"), "--json").out)["findings"]
    assert ("nothing for OpenVINO GenAI" in found[0]["advice"]) is recognised
    attention = [finding["nodes"] for finding in found if finding["what"].startswith("attention is")]
    assert attention == ([LAYERS] if architecture == "gemma2" else [])  # its capped scores have no fused node


@pytest.mark.engine
def test_what_is_attention_in_an_ir(tmp_path: Path) -> None:
    """The Softmax of a product of values; behind weights, as in a router of experts, a Softmax is none."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([-1, 8, 4], np.float32, name="x")
    scores = ops.matmul(x, x, False, True)
    routed = ops.matmul(ops.softmax(scores, -1), ops.constant(np.ones((8, 4), np.float32)), False, False)
    model = openvino.Model([ops.softmax(routed, -1)], [x], "router")
    model.outputs[0].get_tensor().set_names({"logits"})
    openvino.save_model(model, tmp_path / IR_FILE, compress_to_fp16=False)
    assert findings(tmp_path)["attention is"] == 1


@pytest.mark.engine
def test_a_head_behind_a_choice_of_tokens(exported: Exported, tmp_path: Path) -> None:
    """Positions that the caller names leave the number of logits open."""
    import openvino
    from openvino import opset13 as ops

    from nbl_export.graph.ir.anatomy import Dataflow
    from nbl_export.graph.ir.files import read_ir

    model = read_ir(exported("llama", "openvino", "fp16"))
    kept = ops.parameter([-1], np.int64, name="kept")
    head = Dataflow(model).head().input(0)
    head.replace_source_output(ops.gather(head.get_source_output(), kept, ops.constant(1)).output(0))
    model.add_parameters([kept])
    openvino.save_model(model, tmp_path / IR_FILE, compress_to_fp16=False)
    assert findings(tmp_path).keys() == {"weights are"}


# -- folders that are no decoder -----------------------------------------------------------------------------------


@pytest.mark.engine
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / IR_WEIGHTS).unlink(), f"{IR_WEIGHTS} is missing"),
        (lambda folder: (folder / IR_FILE).unlink(), f"{IR_FILE} is missing"),
        (lambda folder: (folder / IR_FILE).write_text("<net><layers>"), "OpenVINO cannot read"),
        (lambda folder: (folder / IR_FILE).write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda folder: (folder / "link.json").symlink_to("/etc/passwd"), "is a link out"),
    ],
)
def test_a_damaged_ir_is_one_sentence(
    damage: Callable[[Path], Any], said: str, exported: Exported, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(exported("llama", "openvino", "fp16"), tmp_path / "ir"))
    damage(copy)
    for given in ((), ("--json",)):
        assert_refused(nbl("inspect", copy, *given), 1, tmp_path, said)


@pytest.mark.engine
def test_an_ir_that_is_no_decoder(tmp_path: Path) -> None:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 2], np.float32, name="x")
    openvino.save_model(openvino.Model([ops.relu(x)], [x], "relu"), tmp_path / IR_FILE)
    assert_refused(nbl("inspect", tmp_path), 1, tmp_path / IR_FILE, "no output named logits")


def test_reading_an_ir_names_the_extra(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = exported("llama", "openvino", "fp16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert_refused(
        nbl("inspect", directory), 1, "openvino, which is not installed", "pip install '.[openvino]' in a clone"
    )


def test_a_path_without_a_decoder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(b"\xff\x00")
    for path in (tmp_path / "none", tmp_path / "none.onnx", tmp_path / "graph.onnx", tmp_path / "openvino_model.xml"):
        assert_refused(nbl("inspect", path), 1, path)
    (tmp_path / "graph.onnx").unlink()
    assert_refused(nbl("inspect", tmp_path), 1, tmp_path, "run directory")
