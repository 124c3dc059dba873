"""The NBL torch model: an affine map where attention was, and a cache that still counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.verify.ladder import Probe
from nbl_export.verify.torch_reference import make_reference, with_noise

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


def test_reference_is_the_model(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    rows = [list(range(2, 30)), list(range(5, 20))]
    probe = Probe(tuple(map(tuple, rows)), (tuple(rows[0][:8]),), 6)
    found = make_reference(model, probe)
    with torch.inference_mode():
        for row, logits in zip(rows, found.logits, strict=True):
            assert (model(torch.tensor([row])).logits[0] == torch.from_numpy(logits)).all()
        out = model.generate(
            torch.tensor([rows[0][:8]]), max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert list(found.greedy[0]) == out[0, 8:].tolist()
    assert not found.noisy and not any(n.any() for n in found.noise)
    measured = with_noise(model, probe, found)
    assert measured.noisy and all(0 < n.max() < 1e-3 for n in measured.noise)
    assert [n.shape for n in measured.noise] == [(len(r),) for r in rows]


def test_prompts_in_one_batch_say_what_each_says_alone(checkpoint: Checkpoint) -> None:
    """Two prompts of one length, and a shorter one between them."""
    model = load_model(checkpoint("llama"))
    prompts = ((5, 9, 17, 33), (7, 8), (40, 3, 22, 11))
    together = make_reference(model, Probe((), prompts, 6))
    with mock.patch.object(type(model), "forward", autospec=True, side_effect=type(model).forward) as forward:
        make_reference(model, Probe((), prompts, 6))
    assert forward.call_count == 2 * 6  # a step for each length
    for k, prompt in enumerate(prompts):
        alone = make_reference(model, Probe((), (prompt,), 6))
        assert together.greedy[k] == alone.greedy[0]
        assert together.margins[k] == pytest.approx(alone.margins[0], abs=1e-4)
