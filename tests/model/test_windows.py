"""Windows of a tiny model's own attention: exact up to W + 1 tokens, then as attention without the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.model.windows import window_layers

from ..tiny import LAYERS, VOCAB

SUPPORTED = ("llama", "llama3", "llama-linear", "mistral", "qwen2", "granite")
REFUSED = {
    "qwen3": "it norms queries and keys",
    "mistral-window": "it has a window of its own",
    "phi3": "are one product",
    "gemma2": "it has a norm behind it",
    "gemma3": "it has several rotary embeddings",
    "olmo2": "it has a norm behind it",
    "smollm3": "no rotary embedding",
    "llama-yarn": "its rotary embedding is of type 'yarn'",
    "llama-bias": "its output has a bias",
}
W = 8


def ids(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(5).integers(2, VOCAB, (2, count)))


def logits(model: Any, text: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(text, use_cache=False).logits
    return found


@pytest.mark.parametrize("tap", ["residual", "normed"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_text_of_its_size_and_one_token_is_as_attention_reads_it(
    name: str, tap: str, checkpoint: Callable[[str], Path]
) -> None:
    model, text = load_model(checkpoint(name)), ids(W + 4)
    right = logits(model, text)
    found = logits(linearize(model, window_layers(model, range(LAYERS), W, tap), tap), text)
    torch.testing.assert_close(found[:, : W + 1], right[:, : W + 1], rtol=1e-4, atol=1e-4)
    assert (found[:, W + 1 :] - right[:, W + 1 :]).abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_token_sees_its_window_and_the_first_token(name: str, checkpoint: Callable[[str], Path]) -> None:
    """Each token alone, behind the first token and its window, as if no other tokens had been written."""
    model, text = load_model(checkpoint(name)), ids(3 * W)
    made = window_layers(model, [0], W, "residual")
    rest = torch.stack([torch.cat([text[:, :1], text[:, t - W + 1 : t + 1]], 1) for t in range(W, 3 * W)], 1)
    right = states(model, rest.flatten(0, 1))[:, -1].unflatten(0, (2, -1))
    found = states(linearize(model, made), text)[:, W:]
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def states(model: Any, text: torch.Tensor) -> torch.Tensor:
    """What enters layer 1."""
    with torch.inference_mode():
        found: torch.Tensor = model(text, use_cache=False, output_hidden_states=True).hidden_states[1]
    return found


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_checkpoint_read_by_layers_gives_the_same_windows(name: str, checkpoint: Callable[[str], Path]) -> None:
    for tap in ("residual", "normed"):
        whole = window_layers(load_model(checkpoint(name)), range(LAYERS), W, tap)
        layers = window_layers(checkpoint(name), range(LAYERS), W, tap)
        for i in range(LAYERS):
            assert layers[i].shape == whole[i].shape and layers[i].tensors().keys() == whole[i].tensors().keys()
            for part, value in layers[i].tensors().items():
                np.testing.assert_array_equal(value, whole[i].tensors()[part])


@pytest.mark.parametrize("name", REFUSED)
def test_other_attention_is_refused(name: str, checkpoint: Callable[[str], Path]) -> None:
    refused = f"layer 1: a window cannot stand for its attention: .*{REFUSED[name]}"
    for model in (load_model(checkpoint(name)), checkpoint(name)):
        with pytest.raises(NblError, match=refused):
            window_layers(model, [1], W, "residual")
