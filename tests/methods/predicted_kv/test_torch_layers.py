"""A decoder above an exit layer, as served: against the original called three times, with its cache edited in
between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize, switched
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.products import epsilon_of
from nbl_export.methods.predicted_kv.sums import ExitShape, own_map
from nbl_export.model.architectures import architecture_of
from tests.exits import by_hand, predicted
from tests.tiny import EPSILON, EVERY, HIDDEN, LAYERS, VOCAB, cases

# Variants of rotary embedding, and every architecture.
SUPPORTED = ("llama3", "llama-linear", "llama-yarn", "llama-bias", "qwen2-window", "phi3-window", "phi4-mini", *EVERY)
W = 5


def ids(count: int, rows: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(2, VOCAB, (rows, count)))


def maps_from(model: Any, exit_layer: int, recent_tokens: int = W) -> dict[int, PredictedKV]:
    """The exact map of the exit layer's layer, and random maps above it."""
    shape = ExitShape.of(model, (exit_layer,))
    made = {exit_layer: own_map(model, exit_layer, exit_layer, recent_tokens)} if shape.exact else {}
    for layer in shape.above(exit_layer):
        rng = np.random.default_rng(layer)
        weight = rng.normal(size=(2 * shape.width, 2 * HIDDEN)).astype(np.float32) / 8
        bias = rng.normal(size=len(weight)).astype(np.float32)
        made[layer] = PredictedKV(weight, bias, HIDDEN, exit_layer, recent_tokens, EPSILON)
    return made


@pytest.mark.parametrize("name", cases(SUPPORTED))
@torch.inference_mode()
def test_steps_of_any_size_are_the_originals_with_an_edited_cache(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(name))
    for exit_layer in range(LAYERS):
        maps = maps_from(model, exit_layer)
        continuing_rows = linearize(load_model(checkpoint(name)), maps)
        cache, ours = DynamicCache(), DynamicCache()
        for tokens in (W + 2, 1, 19, W + 1, 7, 3 * W):
            text = ids(tokens, 2, tokens)
            right, cache = by_hand(model, maps, cache, text)
            found = continuing_rows(text, cache=ours, use_cache=True).logits
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, equal_nan=True)
            for mine, held in zip(ours.layers, cache.layers, strict=True):
                torch.testing.assert_close(mine.keys, held.keys, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(mine.values, held.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral-window", "gemma3", "gpt_oss"])
@torch.inference_mode()
def test_a_cache_may_keep_the_keys_of_a_window_alone(name: str, checkpoint: Callable[[str], Path]) -> None:
    """As `generate` gives one. The batch is padded, so that the place of a first token is one that a window drops, the
    oldest one that it keeps, or a later one."""
    model = linearize(load_model(checkpoint(name)), maps_from(load_model(checkpoint(name)), 1))
    caches = DynamicCache(), DynamicCache(config=model.config)
    rows = 8
    valid = torch.ones(rows, 0, dtype=torch.long)
    for tokens in (W + 20, 1, 30, 1, 2 * W):
        added = torch.ones(rows, tokens, dtype=torch.long)
        if valid.shape[1] == 0:
            added = added.triu()  # each row begins one token later than the one before
        valid = torch.cat([valid, added], 1)
        places = {"attention_mask": valid, "position_ids": (valid.cumsum(1) - 1).clamp(min=0)[:, -tokens:]}
        text = ids(tokens, rows, tokens)
        right, found = (model(text, cache=cache, use_cache=True, **places).logits for cache in caches)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert caches[1].layers[1 if name == "gpt_oss" else 0].keys.shape[2] <= caches[0].layers[0].keys.shape[2]


@torch.inference_mode()
def test_a_short_prompt_is_the_originals_bit_for_bit(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("qwen2"))
    continuing_rows = linearize(copy.deepcopy(model), maps_from(model, 1))
    for tokens in (1, W, W + 1, W + 2):
        right, found = (each(ids(tokens), use_cache=False).logits for each in (model, continuing_rows))
        assert torch.equal(found, right) == (tokens <= W + 1)


@torch.inference_mode()
def test_skipped_rows_are_nan(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    found = linearize(model, maps_from(model, 1))(ids(20), use_cache=False).logits[0]
    assert (~found.isnan().any(1)).nonzero()[:, 0].tolist() == [0, *range(20 - W, 20)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_a_sequence_of_a_padded_batch_is_as_alone(attention: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    model.set_attn_implementation(attention)
    linearize(model, maps_from(model, 1))
    texts = [ids(16, seed=1), ids(9, seed=2), ids(12, seed=3)]
    block, valid = torch.zeros(3, 16, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long)
    for row, text in enumerate(texts):
        block[row, -text.shape[1] :], valid[row, -text.shape[1] :] = text[0], 1
    cache, later = DynamicCache(), ids(2 * W, 3)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    found = model(block, attention_mask=valid, position_ids=positions, cache=cache, use_cache=True).logits[:, -W:]
    valid = torch.cat([valid, torch.ones_like(later)], 1)
    positions = positions[:, -1:] + torch.arange(1, 1 + 2 * W)
    then = model(later, attention_mask=valid, position_ids=positions, cache=cache).logits
    for row, text in enumerate(texts):
        alone = DynamicCache()
        right = model(text, cache=alone, use_cache=True).logits[0, -W:]
        torch.testing.assert_close(found[row], right, rtol=1e-4, atol=1e-4)
        right = model(later[row][None], cache=alone).logits[0]
        torch.testing.assert_close(then[row], right, rtol=1e-4, atol=1e-4, equal_nan=True)


@torch.inference_mode()
def test_the_shortest_sequence_says_whether_a_batch_exits(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    text, valid = ids(16, 2), torch.ones(2, 16, dtype=torch.long)
    valid[1, : 16 - W - 1] = 0
    right = model(text, attention_mask=valid, use_cache=False).logits
    linearize(model, maps_from(model, 1))
    assert torch.equal(model(text, attention_mask=valid, use_cache=False).logits, right)
    with pytest.raises(NblError, match="padded on the left"):
        model(text, attention_mask=valid.flip(1), use_cache=False)


@torch.inference_mode()
def test_generate_continues_from_the_cache(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    maps, text, cache = maps_from(model, 1), ids(30), DynamicCache()
    logits, cache = by_hand(model, maps, cache, text)
    right: list[int] = []
    for _ in range(6):
        right.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([right[-1:]]), cache=cache).logits
    linearize(model, maps)
    model.generation_config.eos_token_id = None
    found = model.generate(text, max_new_tokens=6, do_sample=False)
    assert found[0, 30:].tolist() == right


def test_the_map_of_the_exit_layer_itself_is_exact(checkpoint: Callable[[str], Path]) -> None:
    for name in ("llama-bias", "qwen2", "granite", "qwen3", "gemma2"):
        model = load_model(checkpoint(name))
        layer = model.get_decoder().layers[1]
        with torch.inference_mode():
            x = model(ids(20), use_cache=False, output_hidden_states=True).hidden_states[1]
            mixer = own_map(model, 1, 1, W)
            assert (mixer.exit_layer, mixer.recent_tokens, mixer.inputs) == (1, W, HIDDEN)
            found = predicted(mixer, x)
            normed = layer.input_layernorm(x)
            right = torch.cat([layer.self_attn.k_proj(normed), layer.self_attn.v_proj(normed)], 2)
            torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-6 * float(right.abs().max()))


@pytest.mark.parametrize("name", cases(EVERY))
@torch.inference_mode()
def test_a_norm_is_as_its_record_says(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint(name))
    record = architecture_of(model.config)
    if record.norm_before is None:
        return
    norm = getattr(model.get_decoder().layers[0], record.norm_before)
    x = torch.from_numpy(np.random.default_rng(1).normal(0.3, 1, (4, HIDDEN)).astype(np.float32))
    centred = x - x.mean(1, keepdim=True) if record.norm == "layer" else x
    epsilon = epsilon_of(norm)
    right = centred / (centred.square().mean(1, keepdim=True) + epsilon).sqrt()
    weight = getattr(norm, "weight", torch.ones(HIDDEN))
    right = right * (weight + 1 if record.norm == "rms+1" or name == "nemotron" else weight)
    bias = getattr(norm, "bias", None)
    torch.testing.assert_close(norm(x), right if bias is None else right + bias)


def test_weights_of_maps_are_the_models(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    names = set(model.state_dict())
    linearize(model, maps_from(model, 1))
    added = {f"model.layers.{i}.self_attn.mixer.linear.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert set(model.state_dict()) - names == added


def test_what_cannot_stand_above_an_exit_layer_is_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    maps = maps_from(model, 1)
    with pytest.raises(NblError, match="layer 2: above the exit layer at layer 1"):
        linearize(model, {1: maps[1]})
    with pytest.raises(NblError, match="one exit layer"):
        linearize(model, {**maps, 2: own_map(model, 2, 2, W)})
    assert not any("mixer" in name for name in model.state_dict())

    class Fused(torch.nn.Module):
        pass

    model.get_decoder().layers[2].self_attn = Fused()
    refused = "layer 2: its keys cannot be predicted: it has no products"
    with pytest.raises(NblError, match=refused):
        linearize(model, maps)
    with pytest.raises(NblError, match=refused), switched(model.get_decoder(), modules(maps), "residual"):
        pass


def modules(maps: Mapping[int, Mixer]) -> dict[int, Any]:
    return {layer: mixer.module() for layer, mixer in maps.items()}
