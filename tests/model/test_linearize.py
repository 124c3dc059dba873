"""The NBL torch model: an affine map where attention was, and a cache that still counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize

from ..tiny import ARCHITECTURES

Maps = Callable[..., dict[int, Linear]]
Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_computes_residual_plus_affine_map(architecture: str, checkpoint: Checkpoint, random_maps: Maps) -> None:
    model = linearize(load_model(checkpoint(architecture)), random_maps(1))
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: seen.update(r=args[0]))
    with torch.inference_mode():
        model(torch.arange(2, 22)[None])
    m = random_maps(1)[1]
    expected = seen["x"] + seen["x"] @ torch.from_numpy(m.weight).T + torch.from_numpy(m.bias)
    torch.testing.assert_close(seen["r"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("replaced", [(0,), (1,), (0, 1), (0, 2), (2,)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_steps_equal_one_forward(
    architecture: str, replaced: tuple[int, ...], checkpoint: Checkpoint, random_maps: Maps
) -> None:
    """With layer 0 replaced, transformers would read a past length of 0 if cache indices stayed as they were."""
    model = linearize(load_model(checkpoint(architecture)), random_maps(*replaced))
    ids = torch.arange(2, 42)[None]
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :25], use_cache=True)
        parts = [out.logits]
        for k in range(25, 40):
            out = model(ids[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
