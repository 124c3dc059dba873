"""A GGUF file becomes the checkpoint that transformers would write, with one tensor in memory at a time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.errors import NblError
from nbl_export.model.checkpoint import dequantise, load, pretrained
from nbl_export.model.checkpoint import source as checkpoint_source

from ..command import TINY, assert_refused, nbl
from ..gguf_kinds import HALVES, save_as, save_mixed
from ..jobs import until
from ..tiny import HEAD_DIM, HIDDEN, cases, save_checkpoint, save_gguf

# What transformers reads of other keys than other heads: a size of its own.
_CHANGES = {"qwen3": {"head_dim": 128}, "nemotron": {"num_attention_heads": HIDDEN // HEAD_DIM, "head_dim": HEAD_DIM}}
_PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def mixed(path: Path, head: str | None = "Q6_K") -> Path:
    """A Llama with a matrix of each type."""
    types = dict(zip((*_PARTS, "token_embd"), HALVES, strict=False))
    return save_mixed(path, types, head)


def whole(file: Path, out: Path) -> dict[str, bytes]:
    """The files that transformers writes of the model in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantise, "gguf_outline", lambda _file: None)
        dequantise.dequantise(file, out)
    return content(out)


def streamed(file: Path, out: Path) -> dict[str, bytes]:
    """The files that are written tensor by tensor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dequantise, "model_of", lambda _file: pytest.fail("the whole model was loaded"))
        patch.setattr(dequantise, "_VALUES", 1000)
        dequantise.dequantise(file, out)
    return content(out)


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize(
    "architecture", cases(["llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "nemotron", "stablelm", "starcoder2"])
)
def test_every_file_is_that_of_the_whole_load(architecture: str, tmp_path: Path) -> None:
    made = save_checkpoint(architecture, tmp_path / "model", **_CHANGES.get(architecture, {}))
    file = save_as(architecture, made, tmp_path / "tiny.gguf")
    assert streamed(file, tmp_path / "ours") == whole(file, tmp_path / "theirs")


@pytest.mark.parametrize("head", [None, "Q4_K"])
def test_every_type_and_a_head_of_its_own(head: str | None, tmp_path: Path) -> None:
    file = mixed(tmp_path / "mixed.gguf", head)
    found = streamed(file, tmp_path / "ours")
    assert found == whole(file, tmp_path / "theirs")
    assert (b'"lm_head.weight"' in found["model.safetensors"]) is (head is not None)


def test_several_files_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tensors; which file has which is the choice of either."""
    monkeypatch.setattr(dequantise, "_SHARD", "1MB")
    file = mixed(tmp_path / "mixed.gguf")
    streamed(file, tmp_path / "ours")
    whole(file, tmp_path / "theirs")
    (ours, about), (theirs, expected) = (indexed(tmp_path / name) for name in ("ours", "theirs"))
    assert about == expected and about["total_size"] > 2_000_000
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_array_equal(values.view(np.uint32), theirs[name].view(np.uint32), name)


def indexed(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors, each from the file that the index names, and what the index says of all."""
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
    assert sum(map(len, files.values())) == len(index["weight_map"])
    assert {file.name for file in directory.glob("*.safetensors")} == files.keys()
    return {name: files[file][name] for name, file in index["weight_map"].items()}, index["metadata"]


def at_each_dequantisation(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> None:
    real = gguf.dequantize

    def watched(*given: Any) -> Any:
        do()
        return real(*given)

    monkeypatch.setattr(gguf, "dequantize", watched)


def test_one_tensor_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live bytes of arrays, as NumPy reports them, when rows are dequantised: one matrix, and some rows."""
    monkeypatch.setattr(dequantise, "_VALUES", 1 << 15)
    file, live = mixed(tmp_path / "mixed.gguf"), list[int]()
    monkeypatch.setattr(dequantise, "model_of", lambda _file: pytest.fail("the whole model was loaded"))
    sizes = [4 * int(np.prod(tensor.shape)) for tensor in pretrained.reader(file).tensors]
    arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)

    def count() -> None:
        if not tracemalloc.is_tracing():
            tracemalloc.start()
        traces = tracemalloc.take_snapshot().filter_traces([arrays]).traces
        live.append(sum(trace.size for trace in traces))

    at_each_dequantisation(monkeypatch, count)
    try:
        dequantise.dequantise(file, tmp_path / "out")
    finally:
        tracemalloc.stop()
    assert len(live) > len(sizes)  # matrices in several parts
    assert max(sizes) <= max(live) < max(sizes) + (1 << 18) < sum(sizes) / 7


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no"), OSError(28, "full")])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    source = checkpoint_source.resolve(str(save_gguf(tmp_path / "tiny.gguf")))
    target, calls = tmp_path / "run" / "checkpoint", list[bool]()

    def fail() -> None:
        calls.append(target.exists())  # so a process that is killed leaves none either
        if len(calls) == 12:
            raise error

    with monkeypatch.context() as patch:
        at_each_dequantisation(patch, fail)
        expected = NblError if isinstance(error, RuntimeError) else type(error)
        with pytest.raises(expected, match=r"tiny\.gguf cannot be loaded" if expected is NblError else None):
            load.materialise(source, target)
    assert calls == [False] * 12
    assert not list((tmp_path / "run").iterdir())
    assert (load.materialise(source, target) / "model.safetensors").is_file()


def test_a_tensor_that_cannot_be_read(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence: a type without floats, another shape than the keys state, or a matrix joined with others."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, GGUFTensor, TensorProcessor

    file, run = save_gguf(tmp_path / "tiny.gguf"), tmp_path / "run"

    def refused(*said: str) -> None:
        done = nbl("calibrate", "--model", file, "--calibration", text, *TINY[2:], "--output", run)
        assert_refused(done, 1, "tiny.gguf", *said)
        assert not (run / "checkpoint").exists()

    def changed(patch: pytest.MonkeyPatch, change: Callable[[Any, str], Any]) -> None:
        kind = type("Changed", (TensorProcessor,), {"process": lambda _self, weights, name, **_: change(weights, name)})
        patch.setitem(TENSOR_PROCESSORS, "llama", kind)

    with monkeypatch.context() as patch:
        changed(patch, lambda weights, name: GGUFTensor(weights.T, name, {}))
        refused("token_embd.weight in shape [96, 384], and its keys state [384, 96]")
    with monkeypatch.context() as patch:
        changed(patch, lambda weights, _name: GGUFTensor(weights, None, {}))
        refused("token_embd.weight, which transformers joins with others")
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "dequantize", lambda *_: (_ for _ in ()).throw(NotImplementedError("no floats")))
        refused("cannot be loaded by transformers", "no floats")


def test_a_gguf_larger_than_memory(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole job runs, and no stage loads the model; what loads it says so."""
    monkeypatch.setattr("nbl_export.model.one_layer.available_bytes", lambda: 1000)
    for place in (dequantise, load):
        monkeypatch.setattr(place, "model_of", lambda _model: pytest.fail("the whole model was loaded"))
    file = save_gguf(tmp_path / "tiny.gguf")
    with until("verify"):
        done = nbl("--model", file, "--calibration", text, *TINY, "--layers", 1, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert "one layer at a time: the weights are" in done.err
    monkeypatch.setattr(pretrained, "_has_conversions", lambda _architecture: True)
    with pytest.raises(NblError, match=r"a GGUF file of this architecture needs the whole torch model in memory, and"):
        load.materialise(checkpoint_source.resolve(str(file)), tmp_path / "checkpoint")
