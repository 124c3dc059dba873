"""Scales that move between the matrices of a layer: the function stays, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbl_export.calibrate.awq import groups_of, rescale
from nbl_export.model.checkpoint import load

from ..tiny import EVERY, HIDDEN, LAYERS, cases, record_of


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_the_function_stays_and_the_matrices_change(checkpoint: Callable[[str], Path], architecture: str) -> None:
    model = load.load_model(checkpoint(architecture))
    ids = torch.arange(2, 50)[None]
    groups = list(groups_of(model))
    record = record_of(architecture)
    weighted, dense = architecture != "olmo", record.experts is None
    behind = (record.norm_before and weighted, True, record.norm_mlp and weighted and dense, record.mlp_gated and dense)
    assert len(groups) == LAYERS * sum(map(bool, behind))
    generator = torch.Generator().manual_seed(0)
    sizes = {g.name: g.gathered(torch.zeros(g.readers[0].weight.shape[1])).shape[0] for g in groups}
    scales = {name: torch.exp(torch.randn(size, generator=generator)) for name, size in sizes.items()}
    matrices = [m.clone() for g in groups for m in (r.weight.detach() for r in g.readers)]
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
    rescale(model, scales)
    with torch.inference_mode():
        after = model(ids, use_cache=False).logits
    changed = [r.weight for g in groups for r in g.readers]
    assert all(not torch.allclose(a, b) for a, b in zip(matrices, changed, strict=True))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_scale_at_the_wrong_place_shows(checkpoint: Callable[[str], Path]) -> None:
    """The test above can fail: q alone is stretched, and the norm is not."""
    model, ids = load.load_model(checkpoint("llama")), torch.arange(2, 50)[None]
    with torch.inference_mode():
        before = model(ids, use_cache=False).logits
        model.get_decoder().layers[1].self_attn.q_proj.weight.mul_(torch.linspace(0.5, 2, HIDDEN))
        assert (model(ids, use_cache=False).logits - before).abs().max() > 1e-2
    with pytest.raises(KeyError):
        rescale(model, {"layers.9.qkv": torch.ones(HIDDEN)})
