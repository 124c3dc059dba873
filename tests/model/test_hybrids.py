"""Hybrids in torch: layers without attention are never collected, scored or replaced, and the saved form runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nbl_export.calibrate.collect import Wanted, collect, collect_layers
from nbl_export.errors import NblError
from nbl_export.measure.cost import CostModel, map_sizes, read_mlp
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.hf_classes import restored, save_linearized
from nbl_export.model.checkpoint.load import load_maps, load_model, read_spec
from nbl_export.model.checkpoint.shape import read_shape
from nbl_export.model.checkpoint.source import resolve
from nbl_export.model.hybrids import layer_types
from nbl_export.model.linearize import linearize
from nbl_export.model.streamed import StreamedModel
from nbl_export.model.switched import SwitchedModel
from nbl_export.plan.greedy import GreedyOrder, Judge, Search

from ..tiny import HYBRID_ATTENTION, HYBRIDS, VOCAB

Checkpoint = Callable[[str], Path]
Maps = Callable[..., dict[int, Linear]]
FIRST = [pytest.param(name, marks=() if name == "lfm2_moe" else pytest.mark.fuzz) for name in HYBRIDS]
IDS = torch.randint(2, VOCAB, (4, 40), generator=torch.Generator().manual_seed(3))


def quiet(_done: int, _total: int) -> None:
    pass


@pytest.mark.parametrize("architecture", FIRST)
def test_moments_and_orders_are_of_layers_with_attention(
    architecture: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    """In memory and layer by layer: the same moments, bit for bit, and the same order."""
    directory, model = checkpoint(architecture), load_model(checkpoint(architecture))
    whole = collect(model, IDS, quiet)["residual"]
    assert tuple(whole) == HYBRID_ATTENTION
    parts = list(collect_layers(directory, IDS, [IDS], Wanted(["residual"]), tmp_path, quiet))
    for one, other in zip(whole.values(), parts, strict=True):
        assert torch.equal(one.yx, other["residual"].moments().yx)
    maps = {i: Linear(m.weight * 0.1, m.bias * 0.1) for i, m in random_maps(*HYBRID_ATTENTION).items()}
    orders = [
        Search(Judge(mixes, [IDS[:2], IDS[2:]]), GreedyOrder(), None, quiet).extend(2)
        for mixes in (SwitchedModel(model, maps, "residual"), StreamedModel(directory, maps, "residual", tmp_path))
    ]
    assert orders[0].layers == orders[1].layers and set(orders[0].layers) < set(HYBRID_ATTENTION)
    assert orders[0].steps[-1].loss == pytest.approx(orders[1].steps[-1].loss, rel=1e-4)


@pytest.mark.parametrize("architecture", FIRST)
def test_the_saved_form_generates_as_the_model(
    architecture: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    directory, chosen = checkpoint(architecture), HYBRID_ATTENTION[:2]
    maps = random_maps(*chosen)
    save_linearized(load_model(directory), directory, maps, "residual", tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    ids = IDS[:2, :9]
    said = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
    )
    with torch.inference_mode():
        logits = linearize(load_model(directory), maps)(said, use_cache=False).logits
    ends = loaded.generation_config.eos_token_id
    logits = logits.index_fill(-1, torch.tensor(ends), -torch.inf)  # the least number of tokens leaves them out
    assert torch.equal(said[:, 9:], logits[:, 8:-1].argmax(-1))
    source = resolve(str(tmp_path / "saved"))
    plan, found = load_maps(source, 5, read_spec(source).others)
    assert plan.replaced == chosen and plan.kept == HYBRID_ATTENTION[2:]
    assert all(np.array_equal(found[i].tensors()["weight"], maps[i].weight) for i in chosen)
    shapes = [{n: v.shape for n, v in m.state_dict().items()} for m in (restored(loaded), load_model(directory))]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_the_cost_model_counts_what_torch_computes(
    architecture: str, checkpoint: Checkpoint, random_maps: Maps
) -> None:
    """Products of matrices and attention; a convolution counts its taps, which torch does too.

    torch computes a recurrence in chunks of 64 tokens. Beside the three products with a head's matrix, which the cost
    model counts, each chunk has products of all its pairs of tokens: of keys with keys and queries, and with values.
    """
    directory = checkpoint(architecture)
    spec, shape = read_spec(resolve(str(directory))), read_shape(directory)
    assert spec.attention_layers == HYBRID_ATTENTION and shape.decoder == spec
    matrices = [p for p in load_model(directory).get_decoder().layers.parameters() if p.ndim > 1]
    assert shape.parameters_of_layers == sum(p.numel() for p in matrices)
    assert spec.cache_bytes_per_token(len(spec.attention_layers), 4) == 3 * 2 * spec.num_kv_heads * spec.head_dim * 4
    tokens, config, in_chunks = 64, load_model(directory).config, 0
    if spec.recurrent:
        widths = 2 * config.linear_key_head_dim + config.linear_value_head_dim
        in_chunks = 2 * tokens**2 * widths * config.linear_num_value_heads * len(spec.others)
    costs = CostModel(spec, read_mlp(directory), 4, 4, 4, tokens, all_logits=True, tail_pruned=False)
    for maps in ({}, random_maps(1)):
        model = linearize(load_model(directory), maps)
        model.config._attn_implementation = "eager"
        model.config._experts_implementation = "batched_mm"  # the experts that a token takes
        with torch.inference_mode(), FlopCounterMode(display=False) as counted:
            model(IDS.view(1, -1)[:, :tokens], use_cache=False)
        pairs = 4 * spec.num_heads * spec.head_dim * tokens * (tokens - 1) / 2  # that a causal mask leaves out
        expected = counted.get_total_flops() - in_chunks - pairs * (len(HYBRID_ATTENTION) - len(maps))
        assert costs.prefill_flops(map_sizes(maps)) == pytest.approx(expected, rel=0.005)


def test_a_configuration_says_its_kinds_in_several_ways(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Older LFM2 lists its attention layers; a MLP width may have to be computed."""
    config = json.loads((checkpoint("lfm2") / "config.json").read_text())
    kinds = config.pop("layer_types")
    config |= {"full_attn_idxs": list(HYBRID_ATTENTION), "block_auto_adjust_ff_dim": True, "intermediate_size": 600}
    assert list(layer_types(config)) == kinds
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path / "config.json").decoder.others == (0, 3)
    assert read_mlp(tmp_path).width == 512  # two thirds, up to a multiple of 256
    config["full_attn_idxs"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(NblError, match="no layer_types for its 5 layers"):
        read_shape(tmp_path / "config.json")


def test_hybrids_that_are_not_supported_are_refused_with_the_reason(checkpoint: Checkpoint, tmp_path: Path) -> None:
    config = json.loads((checkpoint("lfm2") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "falcon_h1"}))
    with pytest.raises(NblError, match="'falcon_h1', which is not supported: attention and a Mamba block run side by"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["attention", "mamba", "attention"]}, "its Mamba layers are not passed through"),
        ({"layer_types": None}, "its Mamba layers are not passed through"),  # what transformers then makes
        ({"num_local_experts": 4}, "it has experts, and the GenAI builder"),
        ({"num_local_experts": None}, "it has experts, and the GenAI builder"),
        ({"position_embedding_type": "nope"}, "its attention has no rotation"),
    ],
)
def test_a_granite_4_of_more_than_attention_is_refused_with_the_reason(
    changes: dict[str, object], said: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    config = json.loads((checkpoint("granitemoehybrid") / "config.json").read_text())
    assert read_shape(checkpoint("granitemoehybrid")).mlp.width == config["shared_intermediate_size"]
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    for read in (read_shape, lambda directory: resolve(str(directory))):
        with pytest.raises(NblError, match=f"granitemoehybrid that is not supported: {said}"):
            read(tmp_path)
