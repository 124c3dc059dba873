"""NBL checkpoints with predicted KV: what is loaded computes bit for bit what the linearized model computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nbl_export.hf
from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.copied import copy_linearized
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.checkpoint.source import resolve
from tests.methods.predicted_kv.test_torch_layers import W, ids, maps_from
from tests.tiny import narrowed

STATED = {"layer": 1, "recent_tokens": W, "epsilon": 0.01}
Checkpoint = Callable[[str], Path]


def save(way: str, original: Path, maps: dict[int, Mixer], out: Path) -> Path:
    if way == "copied":
        assert copy_linearized(original, maps, "residual", out)
    else:
        nbl_export.hf.save_linearized(load_model(original), original, maps, "residual", out)
    return out


def loaded(directory: Path) -> Any:
    """The model by transformers in float32, as a user loads it."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return settled(model)


def settled(model: Any) -> Any:
    """The model with weights at aligned addresses, on which the last bits of a product depend; it ends no text."""
    for weight in model.parameters():
        weight.data = weight.data.clone()
    model.generation_config.eos_token_id = None
    return model.eval()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit; rows that do not continue are NaN in both."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


def padded() -> dict[str, torch.Tensor]:
    block, valid = ids(20, 2), torch.ones(2, 20, dtype=torch.long)
    block[1, :7], valid[1, :7] = 0, 0
    return {"input_ids": block, "attention_mask": valid}


@pytest.mark.parametrize("way", ["copied", "saved"])
@pytest.mark.parametrize(
    ("name", "exit_layer"), [("llama", 1), ("qwen2", 2), ("qwen3", 1), ("phi3", 1), ("gemma3", 1), ("olmo2", 1)]
)
@torch.inference_mode()
def test_what_is_loaded_is_the_linearized_model(
    name: str, exit_layer: int, way: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    original = load_model(checkpoint(name))
    maps: dict[int, Mixer] = dict(maps_from(original, exit_layer))
    model = loaded(save(way, checkpoint(name), maps, tmp_path / "nbl"))
    expected = settled(linearize(load_model(checkpoint(name)), maps))
    prompts = [{"input_ids": ids(30)}, padded()]
    for given in prompts:
        assert same(model(**given, use_cache=False).logits, expected(**given, use_cache=False).logits)
        asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        found, right = (one.generate(**given, **asked) for one in (model, expected))
        assert torch.equal(found.sequences, right.sequences)
        assert all(same(*pair) for pair in zip(found.logits, right.logits, strict=True))
        assert not torch.equal(original(**given).logits[:, -1], right.logits[0])  # what the exit layer changes shows
    stock, held = nbl_export.hf.restored(model).state_dict(), original.state_dict()
    assert stock.keys() == held.keys() and all(torch.equal(stock[name], held[name]) for name in held)


@torch.inference_mode()
def test_stored_weights_stay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    given = narrowed(checkpoint("llama"), tmp_path / "given", "bfloat16")
    maps: dict[int, Mixer] = dict(maps_from(load_model(given), 1))
    directory = save("copied", given, maps, tmp_path / "nbl")
    expected = settled(linearize(load_model(given), maps))
    assert same(loaded(directory)(ids(30)).logits, expected(ids(30)).logits)
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert (stored["nbl_kinds"], stored["nbl_exit"]) == (["predicted_kv", "predicted_kv"], STATED)
    kinds = {tuple(tensor.split(".self_attn.")[1:]) for tensor in tensors(directory) if ".1.self_attn." in tensor}
    products = {(f"{name}_proj.weight",) for name in "qkvo"}
    assert kinds == {*products, ("mixer.linear.weight",), ("mixer.linear.bias",)}


def tensors(directory: Path) -> list[str]:
    from safetensors.torch import load_file

    return [name for file in directory.glob("*.safetensors") for name in load_file(file)]


@pytest.fixture(scope="module")
def saved(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NBL checkpoint with an exit layer at layer 1. Never write to it."""
    maps: dict[int, Mixer] = dict(maps_from(load_model(checkpoint("llama")), 1))
    return save("copied", checkpoint("llama"), maps, tmp_path_factory.mktemp("exit") / "nbl")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"layer": 0}, "layer is 1 to 2"), ({"layer": 3}, "layer is 1 to 2"), ({"layer": -1}, "layer is 1 to 2"),
     ({"layer": 1.0}, "'layer' is of the wrong kind"), ({"layer": True}, "'layer' is of the wrong kind"),
     ({"layer": 2}, "keys of layer 1 are predicted below it"),
     ({"recent_tokens": 0}, "recent_tokens is 1 to 511"), ({"recent_tokens": 512}, "recent_tokens is 1 to 511"),
      ({"recent_tokens": 1 << 70}, "'recent_tokens' is of the"),
     ({"recent_tokens": "5"}, "'recent_tokens' is of the wrong kind"), ({"recent_tokens": [5]},
      "'recent_tokens' is of the wrong kind"),
     ({"epsilon": 0}, "epsilon is between 0 and 1"),
     ({"epsilon": 1.5}, "epsilon is between 0 and 1"), ({"epsilon": None}, "'epsilon' is of the wrong kind"),
     ({"far": 3}, "an exit layer has layer, recent_tokens, epsilon")],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be(change: dict[str, Any], said: str, saved: Path, tmp_path: Path) -> None:
    assert_refused(changed(saved, tmp_path / "nbl", nbl_exit={**STATED, **change}), f"no exit layer: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"nbl_exit": None}, "an exit layer has layer"), ({"nbl_exit": {"layer": 1}}, "an exit layer has layer"),
     ({"nbl_kinds": ["linear", "linear"]}, "no layer is of such a kind"),
     ({"nbl_kinds": ["predicted_kv", "linear"]}, "it takes one of linear, predicted_kv for all"),
     ({"nbl_replaced_layers": [1], "nbl_kinds": ["predicted_kv"]}, r"layer \[2\] above it is not replaced")],
    ids=["no exit layer", "parts of it", "no predicted KV", "two methods", "attention above it"],
)  # fmt: skip
def test_an_exit_that_is_not_that_of_the_layers(
    changes: dict[str, Any], said: str, saved: Path, tmp_path: Path
) -> None:
    assert_refused(changed(saved, tmp_path / "nbl", **changes), said)


def test_an_exit_that_is_no_object(saved: Path, tmp_path: Path) -> None:
    directory = changed(saved, tmp_path / "nbl", nbl_exit=[1, 5])
    with pytest.raises(NblError, match=r"nbl_exit \[1, 5\], which is no exit layer: an exit layer has layer"):
        resolve(str(directory))


def changed(saved: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(saved, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return out


def assert_refused(directory: Path, said: str) -> None:
    """By whoever reads the configuration, in one sentence, and by transformers."""
    for read in (resolve, read_shape):
        with pytest.raises(NblError, match=said) as raised:
            read(str(directory))
        assert str(directory) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=said):
        loaded(directory)
