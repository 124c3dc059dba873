"""Windows in transformers' saved form: loaded, generated with, read as maps, and refused if config.json is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.mixers.base import Mixer
from nbl_export.model.checkpoint import load
from nbl_export.model.checkpoint.hf_classes import CLASSES, restored, save_linearized
from nbl_export.model.checkpoint.source import resolve
from nbl_export.model.linearize import linearize
from nbl_export.model.windows import window_layers

from ..tiny import LAYERS, VOCAB, random_map

W, LENGTHS, STEPS = 5, (17, 9), 12
TEXT = torch.from_numpy(np.random.default_rng(2).integers(2, VOCAB, (2, max(LENGTHS))))


def chosen_of(directory: Path, tap: str, tokens: int = W) -> dict[int, Mixer]:
    """A linear layer at 0 and a window at the top."""
    return {0: random_map(0), **window_layers(load.load_model(directory), [LAYERS - 1], tokens, tap)}


def saved(directory: Path, tap: str, out: Path) -> dict[int, Mixer]:
    chosen = chosen_of(directory, tap)
    save_linearized(load.load_model(directory), directory, chosen, tap, out)
    return chosen


def generated(model: Any) -> torch.Tensor:
    """Greedy tokens [2, STEPS] of two prompts, padded on the left."""
    mask = torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    given = {"input_ids": TEXT * mask, "attention_mask": mask.long(), "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    found: torch.Tensor = model.generate(**given, do_sample=False, pad_token_id=0)
    return found[:, max(LENGTHS) :]


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("llama", "residual"),
        ("llama3", "normed"),
        ("qwen2", "residual"),
        ("mistral", "normed"),
        ("granite", "residual"),
    ],
)
def test_a_saved_checkpoint_is_the_linearized_model(
    name: str, tap: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Logits, and greedy text with a cache and padding, also of each prompt alone; and its maps."""
    from transformers import AutoModelForCausalLM

    chosen = saved(checkpoint(name), tap, tmp_path / "saved")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model = linearize(load.load_model(checkpoint(name)), chosen, tap)
    with torch.inference_mode():
        assert torch.equal(loaded(TEXT, use_cache=False).logits, model(TEXT, use_cache=False).logits)
        tokens = generated(loaded)
        assert torch.equal(tokens, generated(model))
        for row, length in enumerate(LENGTHS):
            told = [*TEXT[row, max(LENGTHS) - length :], *tokens[row]]
            alone = loaded(torch.stack(told)[None], use_cache=False).logits[0].argmax(1)
            assert torch.equal(alone[length - 1 : -1], tokens[row])
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config["nbl_kinds"], config["nbl_window"]) == (["linear", "window"], W)
    plan, maps = load.load_maps(resolve(str(tmp_path / "saved")), LAYERS)
    assert (plan.layers, plan.mixers, plan.tap) == ((0, LAYERS - 1), ("linear", "window"), tap)
    for layer, mixer in chosen.items():
        found = maps[layer].tensors()
        assert found.keys() == mixer.tensors().keys()
        assert all(np.array_equal(found[part], array) for part, array in mixer.tensors().items())
    names = load.load_model(checkpoint(name)).state_dict()
    assert {n: v.shape for n, v in restored(loaded).state_dict().items()} == {n: v.shape for n, v in names.items()}


def test_sixteen_bits_keep_the_shape_of_a_window(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Sizes and rotary frequencies come from config.json, so no rounding of weights changes them."""
    from transformers import AutoModelForCausalLM

    chosen = saved(checkpoint("llama3"), "residual", tmp_path / "saved")
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    shutil.copy(tmp_path / "saved" / "tokenizer.json", tmp_path / "half")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    with torch.inference_mode():
        right = wide(TEXT, use_cache=False).logits
        assert (half(TEXT, use_cache=False).logits - right).abs().max() < 0.05 * right.abs().max()
    window = load.load_maps(resolve(str(tmp_path / "half")), LAYERS)[1][LAYERS - 1]
    for part in ("sizes", "frequencies"):
        np.testing.assert_array_equal(window.tensors()[part], chosen[LAYERS - 1].tensors()[part])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nbl_window": 0}, "nbl_window 0, which is not 1 to 512 tokens"),
        ({"nbl_window": 513}, "nbl_window 513, which is not 1 to 512 tokens"),
        ({"nbl_window": None}, "nbl_window None, which is not 1 to 512 tokens"),
        ({"nbl_replaced_layers": [0, LAYERS]}, "replaces layers [0, 3] of"),
        ({"sliding_window": 8, "model_type": "nbl-mistral"}, "it has a window of its own"),
        ({"nbl_kinds": ["window", "window"]}, "lacks the weights"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_configuration_that_cannot_be(
    change: dict[str, object], said: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """By this tool, and by the model class that transformers loads."""
    saved(checkpoint("llama"), "residual", tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    changed = {**config, **change}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(NblError) as refused:
        load.read_spec(resolve(str(tmp_path / "saved")))
    assert said in str(refused.value)
    if said != "lacks the weights":
        config_class, model_class = CLASSES[str(changed["model_type"]).removeprefix("nbl-")]
        with pytest.raises((NblError, ValueError)) as direct, torch.device("meta"):
            model_class(config_class(**changed))
        assert said in str(direct.value)


def test_windows_of_two_sizes_are_not_saved(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load.load_model(checkpoint("llama"))
    both: dict[int, Mixer] = {**window_layers(model, [1], 4, "normed"), **window_layers(model, [2], 6, "normed")}
    with pytest.raises(NblError, match="windows of 4 and 6 tokens"):
        save_linearized(model, checkpoint("llama"), both, "normed", tmp_path / "saved")
