"""NBL checkpoints that are made of the original's files, without a model in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.copied import copy_linearized
from nbl_export.methods.checkpoint.hf_classes import save_linearized
from nbl_export.methods.checkpoint.load import load_model, load_tokenizer
from nbl_export.model import mapped
from nbl_export.model.checkpoint.pretrained import check_weights
from tests.tiny import EVERY, KINDS, cases, narrowed, record_of

IDS = torch.arange(2, 40)[None]
ALONE = [name for name in EVERY if record_of(name).experts is None]
Checkpoint = Callable[[str], Path]
Maps = Callable[..., dict[int, Mixer]]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize(("name", "tap"), cases((name, tap) for name in ALONE for tap in record_of(name).taps))
def test_a_copy_is_what_the_loaded_model_saves(
    name: str, tap: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    maps = random_maps(1, 2)
    save_linearized(load_model(checkpoint(name)), checkpoint(name), maps, tap, tmp_path / "saved")
    assert copy_linearized(checkpoint(name), maps, tap, tmp_path / "copied")
    saved, copied = weights(tmp_path / "saved"), weights(tmp_path / "copied")
    assert saved.keys() == copied.keys()
    assert all(torch.equal(saved[name], copied[name]) for name in saved)
    texts = [{f.name for f in (tmp_path / d).iterdir() if not f.name.startswith("model")} for d in ("saved", "copied")]
    assert texts[0] == texts[1]
    for file in ("config.json", "generation_config.json"):
        told = [json.loads((tmp_path / made / file).read_text(encoding="utf-8")) for made in ("saved", "copied")]
        assert told[0] == told[1], file


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_weights_stay_as_they_are(
    dtype: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of a model that does not fit into memory, in a float32 model, computes what was verified."""
    given, maps = narrowed(checkpoint("qwen2"), tmp_path / "given", dtype), random_maps(0, 2)
    with torch.inference_mode():
        expected = linearize(load_model(given), maps)(IDS, use_cache=False).logits
    with monkeypatch.context() as small:
        small.setattr(mapped, "available_bytes", lambda: 1000)
        assert copy_linearized(given, maps, "residual", tmp_path / "copied")
    before, after = weights(given), weights(tmp_path / "copied")
    kept = before.keys() & after.keys()
    assert len(kept) > 10 and not any(".0.self_attn" in name or ".2.self_attn" in name for name in kept)
    assert all(before[name].dtype == after[name].dtype == getattr(torch, dtype) for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert {after[name].dtype for name in after.keys() - kept} == {torch.float32}
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "copied", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS, use_cache=False).logits, expected)
    assert json.loads((tmp_path / "copied" / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype
    assert load_tokenizer(tmp_path / "copied").encode("import") == load_tokenizer(given).encode("import")


def in_one_part(directory: Path) -> None:
    """Give the file the name of a part, and write the index that names it."""
    part = (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    where = dict.fromkeys(load_file(part), part.name)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8"
    )


@pytest.mark.parametrize("parts", [1, 9])
def test_a_model_in_parts_stays_in_parts(parts: int, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path) -> None:
    load_model(checkpoint("llama")).save_pretrained(tmp_path / "given", max_shard_size="100KB" if parts > 1 else "1GB")
    load_tokenizer(checkpoint("llama")).save_pretrained(tmp_path / "given")
    if parts == 1:
        in_one_part(tmp_path / "given")
    names = {file.name for file in (tmp_path / "given").glob("*.safetensors")}
    assert len(names) == parts
    save_file({"tok_embeddings.weight": torch.zeros(3)}, tmp_path / "given" / "other.safetensors")  # no part of it
    assert copy_linearized(tmp_path / "given", random_maps(1), "residual", tmp_path / "copied")
    assert {file.name for file in (tmp_path / "copied").glob("*.safetensors")} == names
    check_weights(tmp_path / "copied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copied")
    expected = linearize(load_model(checkpoint("llama")), random_maps(1))
    with torch.inference_mode():
        assert torch.equal(model(IDS, use_cache=False).logits, expected(IDS, use_cache=False).logits)


@pytest.mark.parametrize("left", [-1, 40, 4])
def test_a_file_that_ends_early_is_one_sentence(
    left: int, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    given = Path(shutil.copytree(checkpoint("llama"), tmp_path / "given"))
    file = given / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(
        NblError, match=r"model.safetensors is truncated or not a safetensors file \(.*\); fetch it again"
    ):
        copy_linearized(given, random_maps(1), "residual", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_weights_of_other_names_are_left_to_a_loaded_model(
    checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    assert "olmoe" in KINDS  # experts one by one in the files, together in the model
    assert not copy_linearized(checkpoint("olmoe"), random_maps(1), "residual", tmp_path / "copied")
    assert not (tmp_path / "copied").exists()
