"""A model that states more than its files hold is refused before memory is taken for it."""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbl_export.errors import NblError
from nbl_export.files import safetensors_header
from nbl_export.methods.checkpoint.load import load_model, load_tokenizer, materialise, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.maps_file import load_maps
from nbl_export.model.checkpoint import pretrained
from nbl_export.model.checkpoint.pretrained import check_weights
from nbl_export.records.decoder import DecoderSpec
from nbl_export.targets.base import ExportSettings
from nbl_export.targets.export.finish import check_bounds
from nbl_export.targets.onnx import export_genai
from tests.methods.checkpoint.test_hostile_checkpoint import changed

from ..tiny import HEAD_DIM, HIDDEN, INNER, VOCAB, save_gguf

Checkpoint = Callable[[str], Path]
MOST_BYTES = 1 << 30  # of one process; torch and transformers take about a third of it

_FORKS = multiprocessing.get_context("forkserver")  # of a lean process: what tests hold does not count
_FORKS.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "optimum.utils", __name__])


def _refuse(model: str, kind: str, answer: Any) -> None:
    said = ""
    resource.setrlimit(resource.RLIMIT_DATA, (3 * MOST_BYTES, 3 * MOST_BYTES))  # a fault here must not end the machine
    try:
        if kind == "maps":
            load_maps(Path(model), (1,), HIDDEN)
        elif kind == "export":
            check_bounds(Path(model))
            export_genai.build(Path(model), Path(model).parent / "made", ExportSettings("genai", "fp32"))
            said = "exported"
        elif kind == "load":
            load_model(Path(model))
        elif kind == "convert":
            materialise(resolve(model), Path(model).parent / "made")
        else:
            read_spec(resolve(model))
    except NblError as error:
        said = str(error)
    status = Path("/proc/self/status").read_text().splitlines()
    answer.send((said, int(next(line for line in status if line.startswith("VmHWM")).split()[1])))


def refused(model: Path, kind: str) -> str:
    """The sentence that refuses a model, in a process whose memory stays small."""
    answer, sender = _FORKS.Pipe(False)
    process = _FORKS.Process(target=_refuse, args=(str(model), kind, sender))
    process.start()
    sender.close()
    said, peak_kib = answer.recv()
    process.join()
    assert said and peak_kib * 1024 < MOST_BYTES, (said, peak_kib)
    return str(said)


def empty_gguf(path: Path, more: bytes = b"", **numbers: int) -> Path:
    """A GGUF file without tensors: its architecture, a few numbers, and the bytes of another key."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    keys += [text(name) + struct.pack("<II", 4, value) for name, value in numbers.items()]
    keys += [text("more") + more] if more else []
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys)) + b"".join(keys))
    return path


@pytest.fixture
def scalar(tmp_path: Path) -> Path:
    """A checkpoint that states 64 layers of width 8192, and holds one number."""
    model = tmp_path / "model"
    model.mkdir()
    save_file({"x": torch.zeros(1)}, model / "model.safetensors", metadata={"format": "pt"})
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "vocab_size": 128000}
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 64, **sizes}))
    return model


@pytest.mark.process
@pytest.mark.parametrize("kind", ["spec", "convert"])
def test_a_gguf_without_tensors_takes_no_memory(tmp_path: Path, kind: str) -> None:
    file = empty_gguf(tmp_path / "model.gguf")
    assert file.stat().st_size < 133
    assert "its widest weight has 0" in refused(file, kind)


@pytest.mark.process
@pytest.mark.parametrize(
    "key",
    [
        struct.pack("<IIQ", 9, 5, 1 << 62),  # numbers
        struct.pack("<IIQ", 9, 8, 1 << 62),  # texts
        struct.pack("<IIQ", 9, 1, 1 << 24) + bytes(1 << 24),  # all there: the gguf package makes an object of each byte
        struct.pack("<IIQIQ", 9, 9, 1 << 40, 5, 1 << 40),  # arrays
        struct.pack("<IQ", 8, 1 << 62),
        struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(8 << 20),  # empty words, all there
    ],
    ids=["numbers", "texts", "bytes", "arrays", "text", "words"],
)
def test_elements_that_a_gguf_states_take_no_memory(key: bytes, tmp_path: Path) -> None:
    assert "is truncated or not a GGUF file" in refused(empty_gguf(tmp_path / "model.gguf", key), "spec")


@pytest.mark.process
def test_a_map_wider_than_the_decoder_takes_no_memory(tmp_path: Path) -> None:
    head, _ = safetensors_header({"layers.1.bias": ("F32", [32_768]), "layers.1.weight": ("F32", [32_768, 32_768])}, {})
    with (tmp_path / "maps.safetensors").open("wb") as file:  # nothing on the disk but the header
        file.write(head)
        file.truncate(len(head) + 4 * 32_768 * 32_769)
    assert "layers.1.weight has shape [32768, 32768]" in refused(tmp_path / "maps.safetensors", "maps")


@pytest.mark.process
@pytest.mark.parametrize("kind", ["spec", "load"])
def test_a_checkpoint_without_weights_takes_no_memory(scalar: Path, kind: str) -> None:
    if kind == "spec":
        assert "states 64 layers, and its weights have 0" in refused(scalar, kind)
        changed(scalar, "config.json", num_hidden_layers=0)
    assert "its widest weight has 1" in refused(scalar, kind)


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size", "head_dim", "num_attention_heads"])
@pytest.mark.parametrize("number", [200, pytest.param(1 << 29, marks=pytest.mark.process), 1 << 62])
def test_a_size_beyond_the_files_takes_no_memory(
    checkpoint: Checkpoint, tmp_path: Path, name: str, number: int
) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, "config.json", **{name: number})
    reasons = "its widest weight has" if number > VOCAB else "weights do not have the shapes that config.json states"
    reasons += "|is not a multiple of"  # of heads, by transformers
    for asked in (lambda: read_spec(resolve(str(model))), lambda: load_model(model), lambda: check_bounds(model)):
        with pytest.raises(NblError, match=reasons) as refusal:
            asked()
        assert "\n" not in str(refusal.value)
    if number == 1 << 29:
        assert re.search(reasons, refused(model, "load"))


@pytest.mark.parametrize("count", [1 << 40, 1025, 4])
@pytest.mark.parametrize("kind", ["llama", "nbl-llama"])
def test_more_layers_than_the_files_hold(checkpoint: Checkpoint, tmp_path: Path, count: int, kind: str) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    more = {"model_type": kind, "nbl_replaced_layers": [1], "nbl_tap": "residual"} if kind != "llama" else {}
    changed(model, "config.json", num_hidden_layers=count, **more)
    with pytest.raises(NblError, match=f"states {count} layers, and its weights have 3"):
        resolve(str(model))


def test_names_of_a_million_layers_are_not_enough(scalar: Path) -> None:
    save_file({f"model.layers.{i}.x": torch.zeros(0) for i in range(2000)}, scalar / "model.safetensors")
    changed(scalar, "config.json", num_hidden_layers=2000)
    with pytest.raises(NblError, match="states 2000 layers, and at most 1024 are read"):
        resolve(str(scalar))


@pytest.mark.parametrize("key", ["llama.block_count", "mistral.block_count"])  # transformers reads both
def test_more_layers_than_a_gguf_holds(tmp_path: Path, key: str) -> None:
    file = empty_gguf(tmp_path / "model.gguf", b"", **{key: 1 << 30})
    with pytest.raises(NblError, match=f"states {1 << 30} layers, and its weights have 0"):
        resolve(str(file))


@pytest.mark.parametrize("lost", [True, False])
def test_a_gguf_whose_tensors_are_not_those_of_its_keys(checkpoint: Checkpoint, tmp_path: Path, lost: bool) -> None:
    """None of them becomes a random one."""
    name, model = "model.layers.1.mlp.up_proj.weight", Path(shutil.copytree(checkpoint("llama"), tmp_path / "changed"))
    tensors = load_file(model / "model.safetensors")
    tensors |= {name: tensors.pop(name).repeat(2, 1)}
    said = rf"up_proj.weight in shape \[{2 * INNER}, {HIDDEN}\], and its keys state \[{INNER}, {HIDDEN}\]"
    if lost:
        del tensors[name]
        said = f"lacks the weights {name} and 0 more"
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    source = resolve(str(save_gguf(tmp_path / "tiny.gguf", model)))
    for asked in (lambda: read_spec(source), lambda: materialise(source, tmp_path / "made")):
        with pytest.raises(NblError, match=said):
            asked()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("config.json", {"num_labels": 1 << 40}),
        ("config.json", {"text_config": {"num_labels": 1 << 40}}),
        ("config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1e12}}),
        ("tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast", "extra_ids": 1 << 40}),
        ("tokenizer_config.json", {"offset": 1 << 40}),
        ("tokenizer_config.json", {"added_tokens_decoder": {str(1 << 40): {"content": "x"}}}),
    ],
    ids=str,
)
def test_numbers_that_libraries_count_up_to(
    checkpoint: Checkpoint, tmp_path: Path, name: str, values: dict[str, Any]
) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, name, **values)
    with pytest.raises(NblError, match="no decoder has as many"):
        resolve(str(model))


def test_numbers_of_real_tokenizers_pass(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, "tokenizer_config.json", model_max_length=10**30, bos_token_id=128000, extra_ids=100)
    assert load_tokenizer(model)("The")["input_ids"]


@pytest.mark.parametrize("name", ["max_position_embeddings", "seq_length"])
@pytest.mark.parametrize("positions", [1 << 40, 20_000_000, (1 << 24) // HEAD_DIM + 1])
def test_rotary_tables_are_no_larger_than_the_weights(
    checkpoint: Checkpoint, tmp_path: Path, name: str, positions: int
) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, "config.json", **{name: positions})
    with pytest.raises(NblError, match=f"states {positions} positions, whose rotary tables take"):
        check_bounds(model)


@pytest.mark.process
def test_the_most_positions_take_little_memory(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of a model of a megabyte: what the builder of graphs makes of the largest number that passes."""
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, "config.json", max_position_embeddings=(1 << 24) // HEAD_DIM)
    assert refused(model, "export") == "exported"
    assert sum(file.stat().st_size for file in (tmp_path / "made").iterdir()) < 1 << 28


def test_weights_of_quantised_checkpoints_are_left_to_their_reader(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    changed(model, "config.json", quantization_config={"quant_method": "gptq", "bits": 4}, vocab_size=99)
    check_weights(model)


def test_weights_are_compared_once_until_a_file_changes(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    real, loads = pretrained._load, []

    def counted(*given: Any, **more: Any) -> Any:
        loads.append(given)
        return real(*given, **more)

    monkeypatch.setattr(pretrained, "_load", counted)
    check_weights(model)
    check_weights(model)
    assert len(loads) == 1
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for _ in range(2):
        with pytest.raises(NblError, match=r"lacks the weights model\.norm\.weight"):
            check_weights(model)


def test_a_record_of_a_decoder_has_a_number_of_layers_that_decoders_have() -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 384}
    for layers in (0, 1025, 1 << 40):
        with pytest.raises(ValueError, match="1 to 1024 layers"):
            DecoderSpec("llama", layers, **sizes, max_positions=512)
    with pytest.raises(ValueError, match="at most 16,777,216 positions"):
        DecoderSpec("llama", 2, **sizes, max_positions=(1 << 24) + 1)
    assert DecoderSpec("llama", 1024, **sizes, max_positions=1 << 24).num_layers == 1024
