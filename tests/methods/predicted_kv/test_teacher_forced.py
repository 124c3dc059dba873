"""Attention above an exit layer for all positions at once: dense arithmetic, what is served, gradients, and losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize, switched
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.predicted_kv import teacher_forced as all_positions
from nbl_export.methods.predicted_kv.sums import ExitShape
from tests.methods.predicted_kv.test_torch_layers import W, ids, maps_from, modules
from tests.tiny import EVERY, cases


def everywhere(model: Any, maps: Any, text: torch.Tensor, **more: Any) -> torch.Tensor:
    """Logits of all rows."""
    with switched(model.get_decoder(), modules(maps), "residual"):
        found: torch.Tensor = model(text, **{"use_cache": False, **more}).logits
    return found


@pytest.mark.parametrize("block", [1, 4, 7, 128])
@pytest.mark.parametrize("recent_tokens", [1, 3, 8, 40])
@pytest.mark.parametrize(
    "more", [(), (5,), (None, 0.4), (None, None, torch.linspace(-1, 2, 6)), (4, 0.6, torch.ones(6))]
)
def test_blocks_are_dense_attention_with_two_kinds_of_keys(
    block: int, recent_tokens: int, more: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys or a window of them, scores with a cap, and sinks."""
    window, cap, sinks = (*more, None, None, None)[:3]
    monkeypatch.setattr(all_positions, "_BLOCK", block)
    torch.manual_seed(3)
    query = torch.randn(2, 6, 23, 8)
    (key, value), (skipped_key, skipped_value) = (tuple(torch.randn(2, 2, 2, 23, 8)) for _ in range(2))
    found = all_positions.attend(
        query, (key, value), (skipped_key, skipped_value), recent_tokens, all_positions.Scores(0.3, *more)
    )
    key, value, skipped_key, skipped_value = (
        part.repeat_interleave(3, 1) for part in (key, value, skipped_key, skipped_value)
    )
    row, column = torch.arange(23)[:, None], torch.arange(23)
    own = (row - column < recent_tokens) | (column == 0)
    scores = 0.3 * torch.where(own, query @ key.mT, query @ skipped_key.mT)
    scores = scores if cap is None else cap * (scores / cap).tanh()
    unseen = (column > row) | (row - column >= (23 if window is None else window))
    sums = scores.masked_fill(unseen, -torch.inf).exp()
    share = sums / (sums.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None]))
    right = (share * own) @ value + (share * ~own) @ skipped_value
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", cases(("llama-bias", "phi4-mini", *EVERY)))
@torch.inference_mode()
def test_a_row_is_the_last_of_what_is_served_below_two_layers(name: str, checkpoint: Callable[[str], Path]) -> None:
    """With one layer of other keys above the exit layer, the recent keys of the last row are exact in both."""
    model, text = load_model(checkpoint(name)), ids(24, 2)
    for exit_layer in (0, 1, 2):
        maps = maps_from(model, exit_layer)
        found = everywhere(model, maps, text)
        continuing_rows = linearize(copy.deepcopy(model), maps)
        served = torch.stack([continuing_rows(text[:, :t], use_cache=False).logits[:, -1] for t in range(1, 25)], 1)
        same = W + 1 if len(ExitShape.of(model, (exit_layer,)).above(exit_layer)) > 1 else 24
        torch.testing.assert_close(found[:, :same], served[:, :same], rtol=1e-4, atol=1e-4)
        assert exit_layer or (found - served)[:, 2 * W :].abs().amax((0, 2)).min() > 1e-3


@torch.inference_mode()
def test_a_text_of_w_and_one_tokens_is_the_originals(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    for tokens in (W + 1, W + 2):
        same = torch.equal(everywhere(model, maps_from(model, 1), ids(tokens)), model(ids(tokens)).logits)
        assert same == (tokens == W + 1)


def test_gradients_reach_the_maps_and_the_stream(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    made = modules(maps_from(model, 1))
    with switched(model.get_decoder(), made, "residual"):
        model(ids(20), use_cache=False).logits.square().mean().backward()
    assert all(module.linear.weight.grad.abs().max() > 0 for module in made.values())


@pytest.mark.parametrize("bf16_matmul", [False, True])
def test_losses_of_a_mix_are_those_of_all_positions(bf16_matmul: bool, checkpoint: Callable[[str], Path]) -> None:
    model, text = load_model(checkpoint("llama")), ids(24, 2)
    maps = maps_from(model, 1)
    partial = PartialReplacement(model, maps, "residual", bf16_matmul=bf16_matmul)
    assert partial.first((1, 2)) == partial.first((2,)) == 1
    with torch.inference_mode():
        ours, logs = (
            logits[:, :-1].log_softmax(-1)
            for logits in (everywhere(model, {2: maps[2]}, text), model(text, use_cache=False).logits)
        )
    loss = partial.quality_losses(text, {"mix": (2,)})["mix"]
    kl = (logs.exp() * (logs - ours)).sum(-1).mean().item()
    target = -ours.gather(2, text[:, 1:, None]).mean().item()
    assert loss.kl == pytest.approx(kl, rel=0.1 if bf16_matmul else 1e-3)
    assert loss.nbl_sum / loss.positions == pytest.approx(target, rel=0.02 if bf16_matmul else 1e-4)
    assert partial.quality_losses(text, {"mix": (1,)})["mix"].kl < (1e-2 if bf16_matmul else 1e-9)


def test_a_cache_and_padding_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    maps, valid = maps_from(model, 1), torch.ones(1, 20, dtype=torch.long)
    with pytest.raises(NblError, match="without a cache"):
        everywhere(model, maps, ids(20), cache=DynamicCache(), use_cache=True)
    valid[0, 0] = 0
    with pytest.raises(NblError, match="without padding"):
        everywhere(model, maps, ids(20), attention_mask=valid)
