"""Models as they come: GGUF dequantised once, sharded weights, and what tells one model from another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint import load
from nbl_export.methods.checkpoint import source as checkpoint_source
from nbl_export.run_directory import RunDirectory
from tests.command import TINY, assert_refused, nbl, snapshot
from tests.damage import flip, truncate
from tests.jobs import opened as opened_run
from tests.jobs import until
from tests.tiny import INNER, LAYERS, save_gguf

pytestmark = pytest.mark.job


@pytest.fixture(scope="session")
def gguf(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", checkpoint("llama"))


def test_gguf_is_the_same_model(gguf: Path, checkpoint: Any, tmp_path: Path) -> None:
    source = checkpoint_source.resolve(str(gguf))
    assert load.read_spec(source) == load.read_spec(checkpoint_source.resolve(str(checkpoint("llama"))))
    directory = load.materialise(source, tmp_path / "checkpoint")
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        ours, theirs = (load.load_model(d)(ids).logits for d in (directory, checkpoint("llama")))
    torch.testing.assert_close(ours, theirs)
    text = "The language, größer"
    ours, theirs = (load.load_tokenizer(d)(text)["input_ids"] for d in (directory, checkpoint("llama")))
    assert ours == theirs


def test_main_job_on_a_gguf_directory(gguf: Path, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with until("verify"):
        done = nbl("--model", gguf.parent, "--calibration", text, *TINY, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text(encoding="utf-8"))
    assert facts["status"] == "verified"
    assert facts["places"]["model"] == str(gguf)
    weights = run / "checkpoint" / "model.safetensors"
    assert weights.is_file()

    # A finished run has no second copy of the weights, and a command that reads none makes none.
    with RunDirectory(run).opened(create=False) as opened, opened.scratch() as scratch:
        opened.finish("report", "key", scratch, 0.0, ())
    assert not weights.parent.exists()
    job = opened_run(run)
    assert (job.cost.value.mlp.width, job.shortage.value) == (INNER, "")
    assert not weights.parent.exists()
    assert nbl("plan", run).status == 0
    assert nbl("rewrite", run).status == 0
    assert not weights.parent.exists()


def test_gguf_is_dequantised_once_and_again_where_damaged(gguf: Path, tmp_path: Path) -> None:
    source, target = checkpoint_source.resolve(str(gguf)), tmp_path / "checkpoint"
    load.materialise(source, target)
    before, made = snapshot(target), (target / "model.safetensors").stat().st_mtime_ns
    load.materialise(source, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == made
    truncate(target / "model.safetensors", 1000)
    assert snapshot(load.materialise(source, target)) == before
    (target / "tokenizer.json").unlink()
    assert snapshot(load.materialise(source, target)) == before
    (target / "source.json").write_text("[]")
    assert snapshot(load.materialise(source, target)) == before


def test_a_gguf_file_that_ends_early_has_a_sentence_without_words_of_numpy(gguf: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(gguf.read_bytes()[:-1000])
    with pytest.raises(NblError) as caught:
        checkpoint_source.resolve(str(short))
    size = f"{short.stat().st_size:,}"
    assert str(caught.value).endswith(f"damaged behind its header: it has {size} bytes; fetch it again")


def test_a_conversion_replaces_no_folder_of_others(gguf: Path, tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(NblError, match=r"checkpoint is in the way of the converted model; move it"):
        load.materialise(checkpoint_source.resolve(str(gguf)), target)
    assert (target / "thesis.txt").read_text() == "mine"


def test_one_part_of_a_split_file_is_refused(gguf: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader, GGUFWriter

    part = tmp_path / "part-00001-of-00002.gguf"
    writer = GGUFWriter(part, "llama")
    for name, field in GGUFReader(gguf).fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NblError, match=r"one of 2 parts.*--merge"):
        checkpoint_source.resolve(str(part))


@pytest.mark.parametrize("relative", [False, True])
def test_gguf_is_read_once_for_all_questions(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, relative: bool
) -> None:
    from gguf import gguf_reader, tensor_mapping

    from nbl_export.model.checkpoint import pretrained

    pretrained.forget()
    readers, maps = [], []
    made, mapped = gguf_reader.GGUFReader.__init__, tensor_mapping.TensorNameMap.__init__

    def counted(self: Any, *given: Any) -> None:
        readers.append(given)
        made(self, *given)

    def counted_map(self: Any, *given: Any) -> None:
        maps.append(given)
        mapped(self, *given)

    monkeypatch.setattr(gguf_reader.GGUFReader, "__init__", counted)
    monkeypatch.setattr(tensor_mapping.TensorNameMap, "__init__", counted_map)
    monkeypatch.chdir(gguf.parent)
    source = checkpoint_source.resolve(gguf.name if relative else str(gguf))
    load.read_spec(source)
    load.materialise(source, tmp_path / "checkpoint")
    assert (len(readers), len(maps)) == (1, 1)
    assert pretrained.reader(gguf) is pretrained.reader(gguf) and len(readers) == 2  # the first one was released


def test_gguf_that_ends_early(gguf: Path, text: Path, tmp_path: Path) -> None:
    """Wherever it is cut: nothing but one sentence, and no half of a checkpoint."""
    whole = gguf.read_bytes()
    for share in (0.01, 0.1, 0.5, 0.999):
        short = tmp_path / "short.gguf"
        short.write_bytes(whole[: int(len(whole) * share)])
        given = ("--model", short, "--calibration", text, *TINY, "--output", tmp_path / "run")
        assert_refused(nbl(*given), 1, "short.gguf")
        assert not (tmp_path / "run").exists()


def test_sharded_weights(checkpoint: Any, tmp_path: Path) -> None:
    """The index decides; a shard that is cut is found before it is loaded."""
    load.load_model(checkpoint("llama")).save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    source = checkpoint_source.resolve(str(tmp_path))
    assert load.read_spec(source).num_layers == LAYERS
    truncate(shards[1], 5000)
    with pytest.raises(NblError, match=f"{shards[1].name} is truncated"):
        checkpoint_source.resolve(str(tmp_path))
    shards[1].unlink()
    with pytest.raises(NblError, match=f"lacks {shards[1].name}"):
        checkpoint_source.resolve(str(tmp_path))


def test_fingerprint_follows_the_files_and_not_their_place(checkpoint: Any, tmp_path: Path) -> None:
    first = checkpoint_source.resolve(str(checkpoint("llama")))
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), copy)
    (copy / "README.md").write_text("not a part of the model")
    (copy / "tokenizer_backup").mkdir()
    os.utime(copy / "model.safetensors", (0, 0))
    assert checkpoint_source.resolve(str(copy)).fingerprint == first.fingerprint
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        changed = tmp_path / name
        shutil.copytree(copy, changed)
        if name == "config.json":
            (changed / name).write_text((changed / name).read_text() + " ")
        else:
            flip(changed / name)
        assert checkpoint_source.resolve(str(changed)).fingerprint != first.fingerprint


def test_home_directory_is_spelled_out(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint("llama").parent))
    source = checkpoint_source.resolve(f"~/{checkpoint('llama').name}")
    assert source.place == str(checkpoint("llama"))
