"""Sizes from a configuration or the head of a GGUF file alone, against those that transformers reads."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.gguf_header import read_header
from nbl_export.methods.checkpoint import source
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.records.mlp import MlpSpec
from tests.tiny import EVERY, HIDDEN, INNER, cases, mlp_module, save_gguf

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip


def written(directory: Path, **changes: Any) -> Path:
    """A config.json with the sizes of an 8B Llama; None takes a key away."""
    values = {name: value for name, value in {**LLAMA_8B, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory / "config.json"


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_sizes_are_those_of_transformers(architecture: str, checkpoint: Callable[[str], Path]) -> None:
    from transformers import AutoConfig

    directory = checkpoint(architecture)
    found, expected = read_shape(directory), read_spec(source.resolve(str(directory)))
    assert found.decoder == dataclasses.replace(expected, sliding_window=None, full_layers=())
    model = load_model(directory)
    mlps = [mlp_module(layer) for layer in model.get_decoder().layers]
    matrices = [[p.numel() for n, p in m.named_parameters() if p.ndim > 1 and not n.endswith("bias")] for m in mlps]
    assert {sum(sizes) for sizes in matrices} == {found.mlp.elements(HIDDEN)}
    assert found.tied == AutoConfig.from_pretrained(directory).tie_word_embeddings
    # of a configuration that does not say, too
    untold = {**json.loads((directory / "config.json").read_text(encoding="utf-8"))}
    untold.pop("tie_word_embeddings", None)
    usual = type(AutoConfig.from_pretrained(directory))().tie_word_embeddings
    assert source.ARCHITECTURES[untold["model_type"]].tied == usual


def test_an_8b_model_has_its_parameters(tmp_path: Path) -> None:
    assert read_shape(written(tmp_path)).parameters == pytest.approx(8.03e9, rel=1e-3)
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json")


def test_head_of_a_gguf_file(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "tiny.gguf")
    header, reader = read_header(file), gguf.GGUFReader(file)
    assert header.shapes == {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    lengths = {name: len(value) if isinstance(value, list) else value for name, value in values.items()}
    assert {name: header.keys[name] for name in lengths} == pytest.approx(lengths)
    found = read_shape(file)
    assert found.decoder == read_spec(source.resolve(str(file)))
    assert (found.mlp, found.is_gguf) == (MlpSpec(INNER), True)
    assert found.parameters == sum(math.prod(shape) for shape in header.shapes.values() if len(shape) == 2)


def test_a_cut_gguf_file_is_refused(tmp_path: Path) -> None:
    whole = save_gguf(tmp_path / "tiny.gguf").read_bytes()
    end = len(whole) - sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors)
    for length in (0, 3, 7, 23, 40, 100, end // 2, end - 1000):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CorruptError, match="truncated or not a GGUF file"):
            read_header(tmp_path / "cut.gguf")
    name = b"token_embd.weight"
    flat = name + struct.pack("<IQQ", 2, *reversed(read_header(tmp_path / "tiny.gguf").shapes[name.decode()]))
    hostile = [
        whole[:8] + b"\xff" * 16 + whole[24:],  # more of everything than there is
        whole.replace(flat, name + bytes(4)),  # a tensor without dimensions
    ]
    for content in hostile:
        (tmp_path / "cut.gguf").write_bytes(content)
        with pytest.raises(CorruptError, match="truncated or not a GGUF file"):
            read_shape(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "no usable hidden_size"),
        ({"num_hidden_layers": "32"}, "no usable num_hidden_layers"),
        ({"intermediate_size": [1, 2]}, "no usable intermediate_size"),
        ({"vocab_size": 0}, "no usable vocab_size"),
        ({"num_key_value_heads": 5}, "sizes of no decoder"),
        ({"num_hidden_layers": 5000}, "sizes of no decoder"),
        ({"hidden_size": 10**300}, "sizes of no decoder"),
        ({"intermediate_size": 10**300}, "sizes of no decoder"),
        ({"vocab_size": (1 << 24) + 1}, "sizes of no decoder"),
        ({"model_type": "t5"}, "not supported"),
        ({"model_type": None}, "not supported"),
    ],
)
def test_a_configuration_without_sizes_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(NblError, match=said):
        read_shape(written(tmp_path, **changes))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").touch()
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    for name, said in (("none", "no model at"), ("weights.bin", "is not a model"), ("list.json", "which is an object")):
        with pytest.raises(NblError, match=said):
            read_shape(tmp_path / name)
    with pytest.raises(NblError, match=r"no config\.json"):
        read_shape(tmp_path)
