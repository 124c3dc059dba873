"""int4 graphs of somebody else's codes: --quantized-model takes GPTQ, AWQ and Olive as they are, and refuses others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint import load, quantized, source
from tests.codes import GROUP, METHODS, dequantised, quantise
from tests.command import TINY, assert_refused, configured, keys, nbl
from tests.jobs import until
from tests.tiny import HIDDEN, save_checkpoint

pytestmark = pytest.mark.job

Same = tuple[object, ...]
INT4 = ("--precision", "int4", *configured(builder_option="accuracy_level=1"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows have an even number of groups."""
    return save_checkpoint("llama", tmp_path_factory.mktemp("even"), intermediate_size=128)


@pytest.fixture(scope="module")
def even(model: Path, text: Path) -> Same:
    return ("--model", model, "--calibration", text, *TINY)


def matrices(graph: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Name and weight [out, in] of each MatMulNBits of four bits, as the operator's documentation has it."""
    made = onnx.load(str(graph)).graph
    held = {t.name: numpy_helper.to_array(t) for t in made.initializer}
    for node in made.node:
        if node.op_type != "MatMulNBits":
            continue
        codes, scales, zeros = (held.get(name) for name in [*node.input[1:], ""][:3])
        assert codes is not None and scales is not None
        values = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float32)
        middle: Any = 8
        if zeros is not None:
            points = np.stack([zeros & 15, zeros >> 4], -1).reshape(len(codes), -1)  # an odd number is filled up
            middle = points[:, : codes.shape[1], None].astype(np.float32)
        yield node.name, ((values - middle) * scales.reshape(*codes.shape[:2], 1)).reshape(len(codes), -1)


def place_of(name: str) -> tuple[str, ...]:
    """Tensors of the checkpoint that a product of the graph stands for."""
    _, _, layer, part, product, *_ = name.split("/")
    prefix = f"model.{layer}.{'self_attn' if part == 'attn' else part}."
    names = ("q_proj", "k_proj", "v_proj") if product == "qkv_proj" else (product,)
    return tuple(f"{prefix}{n}.weight" for n in names)


@pytest.mark.parametrize(
    ("method", "symmetric"),
    [("gptq", False), ("awq", False), pytest.param("olive", False, marks=pytest.mark.fuzz), ("olive", True)],
    ids=str,
)
def test_codes_are_taken_as_they_are(method: str, symmetric: bool, model: Path, even: Same, tmp_path: Path) -> None:
    theirs = quantise(model, tmp_path / "codes", method, symmetric=symmetric)
    with until("verify"):
        done = nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "run")
    assert done.status == 0, done.err  # verified
    weights, seen = load_file(model / "model.safetensors"), 0
    for which in ("original", "model"):
        for name, weight in matrices(tmp_path / "run" / which / "model.onnx"):
            if not name.startswith("/model/layers."):
                continue
            names = place_of(name.replace("layers.", "layers/", 1).replace("layers/", "layers.", 1))
            expected = torch.cat([dequantised(weights[n].float(), symmetric) for n in names]).numpy()
            np.testing.assert_allclose(weight, expected, atol=1e-6, err_msg=name)
            seen += 1
    assert seen == 3 * 5 + 3 * 3 + 2 * 2  # five products in each of three layers, and no attention in one


def test_it_is_recorded_found_again_and_shown(model: Path, even: Same, tmp_path: Path) -> None:
    theirs = quantise(model, tmp_path / "codes", "gptq")
    words = (*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "run")
    assert nbl(*words).status == 0
    facts = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert f"--quantized-model {theirs}" in facts["command"]
    assert facts["quantized"]["method"] == "gptq"
    for page in ("report.html", "report.md"):
        assert f"gptq codes of codes in groups of {GROUP}" in (tmp_path / "run" / page).read_text(encoding="utf-8")
    assert "gptq codes of codes" in nbl("inspect", tmp_path / "run").out
    again = nbl(*words)
    assert "decoder graph: reused" in again.err
    shutil.rmtree(theirs)
    quantise(model, theirs, "gptq", symmetric=True)
    with until("verify"):
        assert "decoder graph: done" in nbl(*words).err
    moved = theirs.rename(tmp_path / "other")
    gone = nbl(*words)
    assert_refused(gone, 1, str(theirs))
    changed = nbl("rewrite", tmp_path / "run", *keys(quantized_model=str(moved)))
    assert changed.status == 0 and "decoder graph: reused" in changed.err, changed.err  # same files, another place


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"bits": 8}, ("8 bits", "4 bits")),
        ({"group_size": -1}, ("groups of -1", "16, 32")),
        ({"desc_act": True}, ("ordered by activation", "desc_act")),
        ({"quant_method": "bitsandbytes"}, ("bitsandbytes", "gptq, awq, olive")),
    ],
    ids=str,
)
def test_other_codes_are_refused_before_anything_is_written(
    settings: dict[str, object], parts: tuple[str, ...], model: Path, even: Same, tmp_path: Path
) -> None:
    theirs = quantise(model, tmp_path / "codes", "gptq")
    config = json.loads((theirs / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"].update(settings)
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "run")
    assert_refused(refused, 1, "--quantized-model", *parts)
    assert not (tmp_path / "run").exists()


def test_codes_of_no_or_another_model_are_refused(model: Path, even: Same, tmp_path: Path) -> None:
    smaller = save_checkpoint("llama", tmp_path / "smaller", num_hidden_layers=2)
    other = quantise(model, tmp_path / "other", "olive")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for number, (theirs, parts) in enumerate((
        (model, ("no quantization_config", *METHODS)),
        (quantise(smaller, tmp_path / "codes", "olive"), ("another model", "num_layers is 2, and 3")),
        (other, ("other numbers in model.norm.weight", "same")),
    )):  # fmt: skip
        refused = nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / f"run{number}")
        assert_refused(refused, 1, *parts)
    assert not (tmp_path / "run0").exists()


def _with_scales(model: Path, out: Path) -> Path:
    """A checkpoint of the same function, with scales moved from norms into the matrices behind them."""
    loaded = load.load_model(model)
    generator = torch.Generator().manual_seed(1)
    for layer in loaded.get_decoder().layers:
        attention, mlp = layer.self_attn, layer.mlp
        behind = {
            layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, readers in behind.items():
            scale_D = torch.exp(0.4 * torch.randn(HIDDEN, generator=generator))
            norm.weight.data.div_(scale_D)
            for reader in readers:
                reader.weight.data.mul_(scale_D)
    shutil.copytree(model, out)
    tensors = {n: t.detach().contiguous() for n, t in loaded.state_dict().items() if n != "lm_head.weight"}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_scales_in_the_norms_are_for_maps_on_the_residual_stream(model: Path, even: Same, tmp_path: Path) -> None:
    """AWQ moves scales from matrices to the norm before them, where a map of the normed input was fitted without."""
    theirs = quantise(_with_scales(model, tmp_path / "scaled"), tmp_path / "codes", "awq")
    words = (*even, *INT4, "--quantized-model", theirs)
    with until("verify"):
        assert nbl(*words, "--output", tmp_path / "run").status == 0
    refused = nbl(*words, *configured(builder_option="accuracy_level=1", tap="normed"), "--output", tmp_path / "other")
    assert_refused(refused, 1, "model.layers.0.input_layernorm.weight", "tap = 'residual'")


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_scaled_matrices_with_the_old_norms_are_refused(norm: str, model: Path, even: Same, tmp_path: Path) -> None:
    theirs = quantise(_with_scales(model, tmp_path / "scaled"), tmp_path / "codes", "awq")
    tensors, old = load_file(theirs / "model.safetensors"), load_file(model / "model.safetensors")
    name = f"model.layers.1.{norm}.weight"
    save_file({**tensors, name: old[name]}, theirs / "model.safetensors", {"format": "pt"})
    refused = nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "run")
    assert_refused(refused, 1, name, "another function")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("scales", lambda t: t[:0]),
        ("scales", lambda t: t[:1].repeat(5, 1)),
        ("scales", lambda t: t[:1].repeat(128, 1)),
        ("scales", lambda t: t[0, :2]),
        ("scales", lambda t: t[:0].sum()),
        ("qweight", lambda t: t[:0]),
        ("qweight", lambda t: t.float()),
        ("qzeros", lambda t: t[:, :1]),
    ],
    ids=range(8),
)
def test_codes_of_other_shapes_are_refused(name: str, changed: Any, model: Path, tmp_path: Path) -> None:
    theirs = quantise(model, tmp_path / "codes", "awq")
    quantized.check_same(source.resolve(str(theirs)), model, "residual")
    tensors = load_file(theirs / "model.safetensors")
    full = f"model.layers.1.self_attn.q_proj.{name}"
    tensors[full] = changed(tensors[full]).contiguous()
    save_file(tensors, theirs / "model.safetensors", {"format": "pt"})
    with pytest.raises(NblError, match=r"quantise the model again|cannot be compared with the model") as refusal:
        quantized.check_same(source.resolve(str(theirs)), model, "residual")
    assert "\n" not in str(refusal.value)


def test_zero_points_of_the_second_gptq_format_are_refused(model: Path, even: Same, tmp_path: Path) -> None:
    """They say that they are of the first one, and every weight would be a step off."""
    theirs = quantise(model, tmp_path / "codes", "gptq", symmetric=True)
    with until("decoder"):
        assert nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "first").status == 0
    tensors = load_file(theirs / "model.safetensors")
    more = {n: t + 0x11111111 if n.endswith("qzeros") else t for n, t in tensors.items()}
    save_file(more, theirs / "model.safetensors", {"format": "pt"})
    refused = nbl(*even, *INT4, "--quantized-model", theirs, "--output", tmp_path / "second")
    assert_refused(refused, 1, "zero points as they are", "gptq_v2")
