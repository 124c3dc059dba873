"""The plugin's model classes on stand-ins for vLLM's layers: what a forward computes, and what is refused.

`test_vllm.py` runs the plugin in vLLM itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear

from ..exits import predicted_maps
from ..tiny import HEAD_DIM, HIDDEN, KV_HEADS, LAYERS
from . import fake_vllm

IDS = torch.arange(3, 40)
NAMES = [f"nbl_export.targets.checkpoint.vllm.{name}" for name in ("models", "predicted_kv", "prefix")]
W = 5


STATED = {"layer": 1, "recent_tokens": W, "epsilon": 1e-5}
ABOVE = {"nbl_replaced_layers": [1, 2], "nbl_kinds": ["predicted_kv"] * 2, "nbl_exit": STATED}


@pytest.fixture(scope="module")
def models() -> Iterator[ModuleType]:
    """`nbl_export.targets.checkpoint.vllm.models`, imported from stand-ins and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch)
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module(NAMES[0])
        for name in NAMES:
            del sys.modules[name]


@pytest.fixture
def built(models: ModuleType, checkpoint: Callable[[str], Path]) -> Callable[..., Any]:
    """(maps, settings) -> the plugin's Llama with these maps loaded, and its configuration."""

    def make(maps: dict[int, Linear], prefix: str = "", **settings: Any) -> tuple[Any, Any]:
        asked = {"nbl_replaced_layers": list(maps), **settings}
        config = fake_vllm.vllm_config(load_model(checkpoint("llama")), **asked)
        model = models.NblLlamaForCausalLM(vllm_config=config, prefix=prefix).eval()
        model.load_weights(tensors(maps))
        return model, config

    return make


def tensors(maps: dict[int, Linear]) -> list[tuple[str, torch.Tensor]]:
    return [
        (f"model.layers.{i}.self_attn.linear.{name}", torch.from_numpy(value))
        for i, m in maps.items()
        for name, value in (("weight", m.weight), ("bias", m.bias))
    ]


@pytest.mark.parametrize("tap", ["residual", "normed"])
@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_logits_are_those_of_transformers(
    layers: tuple[int, ...], tap: str, built: Callable[..., Any],
    checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]],
) -> None:  # fmt: skip
    maps = random_maps(*layers)
    model, config = built(maps, nbl_tap=tap)
    with torch.inference_mode():
        expected = linearize(load_model(checkpoint("llama")), maps, tap)(IDS[None]).logits
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    kept = [f"model.layers.{i}.self_attn.attn" for i in range(LAYERS) if i not in layers]
    assert list(config.compilation_config.static_forward_context) == kept  # vLLM allocates caches for these


def test_a_map_of_zeros_adds_nothing(
    built: Callable[..., Any], checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]
) -> None:
    maps = {**random_maps(0), 2: Linear.zeros(HIDDEN)}
    model, _ = built(maps, nbl_replaced_layers=[0, 2])
    with torch.inference_mode():
        expected = linearize(load_model(checkpoint("llama")), maps)(IDS[None]).logits
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


def test_the_stand_in_is_the_original_without_the_plugin(checkpoint: Callable[[str], Path]) -> None:
    theirs = load_model(checkpoint("llama"))
    with torch.inference_mode():
        expected = theirs(IDS[None]).logits
        found = fake_vllm.Llama(vllm_config=fake_vllm.vllm_config(theirs))(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parallel", "kind", "gathered"),
    [("replicated", fake_vllm.ReplicatedLinear, {}),
     ("column", fake_vllm.ColumnParallelLinear, {"gather_output": True})],
)  # fmt: skip
def test_a_map_is_one_linear_layer_of_vllm(
    parallel: str, kind: Any, gathered: dict[str, bool], models: ModuleType, random_maps: Callable[..., Any]
) -> None:
    attention = models.LinearAttention(HIDDEN, parallel, "4 bits", "model.layers.1.self_attn")
    assert type(attention.linear) is kind
    assert attention.linear.settings == {
        "quant_config": "4 bits", "prefix": "model.layers.1.self_attn.linear", **gathered
    }  # fmt: skip
    m = random_maps(1)[1]
    attention.load_state_dict({"linear.weight": torch.from_numpy(m.weight), "linear.bias": torch.from_numpy(m.bias)})
    hidden = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = hidden @ torch.from_numpy(m.weight).T + torch.from_numpy(m.bias)
    with torch.inference_mode():
        found = attention(positions=torch.arange(5), hidden_states=hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_draft_has_a_prefix_that_its_checkpoint_lacks(
    built: Callable[..., Any], random_maps: Callable[..., dict[int, Linear]]
) -> None:
    model, config = built(random_maps(1), prefix="draft")
    assert model.model.layers[1].self_attn.linear.settings["prefix"] == "draft.model.layers.1.self_attn.linear"
    assert "draft.model.layers.1.self_attn.attn" not in config.compilation_config.static_forward_context


# Steps of three prompts of 30, 4 and 17 tokens, and of what is generated behind them: (request, rows) of each step.
SCHEDULES = {
    "whole": [[(0, 30), (1, 4), (2, 17)]],
    "chunks": [[(2, 1)], [(0, 9)], [(0, 4), (1, 4)], [(0, 12)], [(2, 15), (0, 2)], [(0, 3), (2, 1)]],
    "one_by_one": [[(n, 1)] for n, count in enumerate((30, 4, 17)) for _ in range(count)],
}


@pytest.mark.parametrize("exit_layer", [1, 2])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_predicted_keys_do_not_depend_on_the_schedule(
    schedule: str, exit_layer: int, models: ModuleType, checkpoint: Callable[[str], Path]
) -> None:
    maps = predicted_maps(exit_layer, W, KV_HEADS * HEAD_DIM)
    model = exit_model(models, checkpoint, maps)
    right = linearize(load_model(checkpoint("llama")), maps)
    prompts, blocks = (30, 4, 17), torch.arange(36).view(12, 3).T.tolist()  # higher ones as a text grows
    texts = [torch.from_numpy(np.random.default_rng(n).integers(2, 300, n + 3)) for n in prompts]
    runner, done = fake_vllm.Blocks(model), [0, 0, 0]
    for step in [*SCHEDULES[schedule], *[[(0, 1), (1, 1), (2, 1)]] * 3]:
        parts = [(texts[r][done[r] : done[r] + n], done[r], prompts[r], blocks[r]) for r, n in step]
        for (r, n), logits in zip(step, runner.step(parts), strict=True):
            done[r] += n
            if done[r] >= prompts[r]:
                wanted = expected_logits(right, texts[r], prompts[r], done[r])
                torch.testing.assert_close(logits[-1], wanted, rtol=1e-4, atol=1e-4)
    assert done == [33, 7, 20]


def test_the_prefix_cache_keeps_predicted_keys_alone(models: ModuleType) -> None:
    prefix: Any = sys.modules[NAMES[2]]
    spec, request = prefix.ExitSpec.of(fake_vllm.Spec(), W), SimpleNamespace()
    for prompt, computed, kept in ((30, 12, 12), (30, 40, 30 - W), (W - 1, 9, 0)):
        request.num_prompt_tokens = prompt
        prefix.ExitManager(spec).cache_blocks(request, computed, replay_boundaries=())
        assert request.kept == kept
    found = [prefix.ExitManager.find_longest_cache_hit([], tokens - 1, kv_cache_spec=spec) for tokens in (30, W - 1)]
    assert found == [30 - W, 0]


@pytest.mark.parametrize(("ranks", "held"), [(1, 4), (2, 2), (8, 1)])
def test_each_rank_fills_the_heads_that_it_holds(
    ranks: int, held: int, models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 heads, which more ranks share. A number of the map is its place."""
    exit_layer: Any = sys.modules[NAMES[1]]
    monkeypatch.setattr(exit_layer, "get_tensor_model_parallel_world_size", lambda: ranks)
    step = SimpleNamespace(nbl_rows=SimpleNamespace(skipped=slice(None)), nbl_skipped_slots=None, slot_mapping=None)
    for rank in range(ranks):
        monkeypatch.setattr(exit_layer, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        filled: list[Any] = []
        impl = SimpleNamespace(do_kv_cache_update=lambda _attn, *given, to=filled: to.extend(given[:2]))
        attention = SimpleNamespace(
            attn=SimpleNamespace(num_kv_heads=held, head_size=3, layer_name="a", kv_cache=None, impl=impl),
            total_num_kv_heads=4, mixer=SimpleNamespace(linear=lambda _features: torch.arange(24.0)[None]),
            rotary_emb=lambda _positions, keys, _none: (keys, None),
        )  # fmt: skip
        exit_layer.ExitLayer({"recent_tokens": W, "before": True, "epsilon": 1e-5}, (1, 2), 8).fill(
            step, attention, torch.zeros(1)
        )
        first = rank * 4 // ranks
        heads = torch.arange(24.0).view(2, 4, 3)[:, first : first + held]
        assert torch.equal(torch.stack([part[0] for part in filled]), heads)


def exit_model(models: ModuleType, checkpoint: Callable[[str], Path], maps: dict[int, Any], **settings: Any) -> Any:
    one = next(iter(maps.values()))
    facts = {"layer": one.exit_layer, "recent_tokens": one.recent_tokens, "epsilon": one.epsilon}
    asked = {
        "nbl_replaced_layers": list(maps),
        "nbl_kinds": ["predicted_kv"] * len(maps),
        "nbl_exit": facts,
        **settings,
    }
    config = fake_vllm.vllm_config(load_model(checkpoint("llama")), **asked)
    model = models.NblLlamaForCausalLM(vllm_config=config).eval()
    model.load_weights([(name.replace("self_attn.", "self_attn.mixer."), value) for name, value in tensors(maps)])
    return model


def expected_logits(model: Any, ids: torch.Tensor, prompt: int, tokens: int) -> torch.Tensor:
    """Logits behind `tokens` tokens, of which the prompt is one step."""
    cache = DynamicCache()
    with torch.inference_mode():
        for at in (slice(0, prompt), *(slice(n, n + 1) for n in range(prompt, tokens))):
            logits = model(ids[None, at], past_key_values=cache, use_cache=True).logits
    return logits[0, -1]


@pytest.mark.parametrize("lost", ["model.layers.2.self_attn.linear.bias", "model.layers.0.self_attn.linear.bias"])
def test_a_checkpoint_without_a_map_is_refused(
    lost: str, built: Callable[..., Any], random_maps: Callable[..., dict[int, Linear]]
) -> None:
    maps = random_maps(0, 2)
    model, _ = built(maps)
    with pytest.raises(ValueError, match=f"the checkpoint has no {lost}"):
        model.load_weights([(name, value) for name, value in tensors(maps) if name != lost])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"nbl_replaced_layers": []}, "replaces layers [] of 3"),
        ({"nbl_replaced_layers": None}, "replaces layers [] of 3"),
        ({"nbl_replaced_layers": [0, 1, 2]}, "replaces layers [0, 1, 2] of 3"),
        ({"nbl_replaced_layers": [1, 3]}, "replaces layers [1, 3] of 3"),
        ({"nbl_replaced_layers": [1], "nbl_tap": "other"}, "nbl_tap 'other'"),
        ({"nbl_replaced_layers": [1], "nbl_kinds": ["memory"]}, "of the kinds ['memory']"),
        ({"nbl_replaced_layers": [1], "nbl_parallel": "row"}, "nbl_parallel 'row'"),
        ({"nbl_replaced_layers": [1, 2], "nbl_kinds": ["predicted_kv"] * 2}, "vLLM runs linear layers"),
        ({**ABOVE, "nbl_replaced_layers": [2], "nbl_kinds": ["predicted_kv"]}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": {"layer": 1}}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": {**STATED, "recent_tokens": 0}}, "which is no exit layer: recent_tokens is 1 to"),
        ({**ABOVE, "nbl_exit": {**STATED, "recent_tokens": "5"}}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": {**STATED, "recent_tokens": 1 << 40}}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": {**STATED, "epsilon": -1.0}}, "which is no exit layer: epsilon is between 0 and 1"),
        ({**ABOVE, "nbl_exit": {**STATED, "epsilon": None}}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": {**STATED, "layer": "1"}}, "which is no exit layer"),
        ({**ABOVE, "nbl_exit": [1]}, "which is no exit layer"),
        ({**ABOVE, "nbl_kinds": ["predicted_kv", "linear"]}, "which is no exit layer"),
        ({**ABOVE, "model_type": "nbl-qwen3"}, "nbl-qwen3 has no predicted KV in vLLM"),
        ({**ABOVE, "pipeline_parallel_size": 2}, "do not go with pipeline stages; start vLLM without"),
        ({**ABOVE, "cudagraph": "FULL"}, "do not go with CUDA graphs; start vLLM with --enforce-eager"),
        ({**ABOVE, "method": "eagle3"}, "do not go with a draft model"),
        ({"nbl_replaced_layers": [2], "elsewhere": (0, 1)}, "the pipeline stage of layers 2 to 2 has no attention"),
    ],
)
def test_refused(settings: dict[str, Any], said: str, models: ModuleType, checkpoint: Callable[[str], Path]) -> None:
    config = fake_vllm.vllm_config(load_model(checkpoint("llama")), **settings)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        models.NblLlamaForCausalLM(vllm_config=config)
    assert said in str(caught.value)


def test_a_pipeline_stage_replaces_its_own_layers(
    models: ModuleType, checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]
) -> None:
    config = fake_vllm.vllm_config(
        load_model(checkpoint("llama")), nbl_replaced_layers=[0, 2], elsewhere=(0,)
    )  # fmt: skip
    model = models.NblLlamaForCausalLM(vllm_config=config)
    assert isinstance(model.model.layers[2].self_attn, models.LinearAttention)
    assert len(model.load_weights(tensors(random_maps(2)))) == 2
