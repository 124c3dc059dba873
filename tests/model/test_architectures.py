"""Each architecture on a tiny random checkpoint: what its record says is so in transformers, and what follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import architecture_of, linearize, run_from
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.distill.training import DistillSettings, distill
from nbl_export.methods.linear.collect import Collection, collect, read_sums
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.losses import PartialReplacement
from nbl_export.methods.sums_file import open_sums
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.model.head import logits_of
from nbl_export.model.mapped import mapped_model
from nbl_export.records.decoder import DecoderSpec

from ..tiny import EVERY, LAYERS, VARIANTS, VOCAB, cases, record_of

Checkpoint = Callable[[str], Path]
Maps = Callable[..., dict[int, Linear]]
IDS = torch.arange(2, 42)[None]  # longer than the tiny windows
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def test_every_record_has_a_tiny_model(checkpoint: Checkpoint) -> None:
    assert {read_spec(resolve(str(checkpoint(a)))).architecture for a in EVERY} == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_a_map_takes_the_place_of_the_whole_block(architecture: str, checkpoint: Checkpoint, random_maps: Maps) -> None:
    """The MLP sees x + x W' + b: no norm, no multiplier of the original is left between map and addition."""
    model = linearize(load_model(checkpoint(architecture)), random_maps(1))
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    first = _first_of_mlp(model, layer)
    layer.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    first.register_forward_pre_hook(lambda _m, args: seen.update(r=args[0]))
    with torch.inference_mode():
        model(IDS)
    m = random_maps(1)[1]
    expected = seen["x"] + seen["x"] @ torch.from_numpy(m.weight).T + torch.from_numpy(m.bias)
    torch.testing.assert_close(seen["r"], expected, **CLOSE)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_moments_are_of_what_the_block_adds(architecture: str, checkpoint: Checkpoint) -> None:
    """y of the moments is the difference of the residual stream across the attention block, read off the layer."""
    model = load_model(checkpoint(architecture))
    taps = architecture_of(model.config).taps
    if "normed" not in taps:
        with pytest.raises(NblError, match="tap normed is not possible for"):
            _check(model, tap="normed")
    layer = model.model.layers[1]
    seen: dict[str, list[torch.Tensor]] = {"x": [], "r": []}
    _first_of_mlp(model, layer).register_forward_pre_hook(lambda _m, args: seen["r"].append(args[0]))
    layer.register_forward_pre_hook(lambda _m, args: seen["x"].append(args[0]))
    ids = torch.arange(2, 66).view(2, 32)
    found = collect(model, ids, lambda *_: None, taps)
    y = (seen["r"][-1] - seen["x"][-1]).flatten(0, 1).double().mean(0)
    for tap in taps:
        moments = found[tap][1]
        np.testing.assert_allclose(moments.y_sum / moments.count, y.numpy(), atol=1e-5, err_msg=tap)


@pytest.mark.parametrize("architecture", cases([*EVERY, "qwen2-window"]))
def test_layer_by_layer_moments_are_those_of_the_whole_model(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ids = torch.arange(2, 130).view(2, 64) % VOCAB
    whole = collect(load_model(checkpoint(architecture)), ids, lambda *_: None)["residual"]
    facts = {"identity": {"batches": 1}, "done": 1}
    with Collection(mapped_model(checkpoint(architecture)), ["residual"]) as found:
        found.by_layer(ids, tmp_path / "sums", facts, tmp_path, lambda *_: None)
    file = open_sums(tmp_path / "sums")
    for layer, one in whole.items():
        mine = read_sums(file, layer, "residual").moments()
        assert torch.equal(one.xx, mine.xx) and torch.equal(one.yx, mine.yx) and torch.equal(one.yy, mine.yy)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_cached_steps_equal_one_forward(architecture: str, checkpoint: Checkpoint, random_maps: Maps) -> None:
    """With layer 0 replaced, transformers would read a past length of 0 if cache indices stayed as they were."""
    for replaced in ((0,), (1,), (0, 1), (0, 2), (1, 2)):
        model = linearize(load_model(checkpoint(architecture)), random_maps(*replaced))
        with torch.inference_mode():
            whole = model(IDS, use_cache=False).logits
            out = model(IDS[:, :25], use_cache=True)
            parts = [out.logits]
            for k in range(25, 40):
                out = model(IDS[:, k : k + 1], past_key_values=out.past_key_values, use_cache=True)
                parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE, msg=str(replaced))


@pytest.mark.parametrize("architecture", cases([*EVERY, *VARIANTS]))
def test_logits_and_entries_are_those_of_the_model(architecture: str, checkpoint: Checkpoint) -> None:
    """What is made from hidden states by hand (head with caps and divisors, entry without its multiplier)."""
    model = load_model(checkpoint(architecture))
    seen: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.inference_mode():
        expected = model(IDS, use_cache=False).logits
        torch.testing.assert_close(logits_of(model, run_from(model.model, seen[0])), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", cases([*EVERY, "qwen2-window"]))
def test_switched_layers_are_the_linearized_model(architecture: str, checkpoint: Checkpoint, random_maps: Maps) -> None:
    """Also where a mix is run from its lowest layer on: masks and rotary embeddings stay those of each layer."""
    model, maps = load_model(checkpoint(architecture)), random_maps(*range(LAYERS))
    with torch.inference_mode():
        base = model(IDS, use_cache=False).logits[0, :-1].log_softmax(-1)
    switched = PartialReplacement(model, maps, "residual")
    for replaced_set in ((0,), (1,), (1, 2), (2,)):
        ours = linearize(load_model(checkpoint(architecture)), {i: maps[i] for i in replaced_set})
        with torch.inference_mode():
            other = ours(IDS, use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = (base.exp() * (base - other)).sum(1).mean().item()
        assert switched.quality_losses(IDS, {"mix": replaced_set})["mix"].kl == pytest.approx(expected, rel=1e-4), (
            replaced_set
        )


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "granite", "olmo2", "phi3", "olmoe"])
def test_distilled_maps_start_from_the_fitted_ones(
    architecture: str, checkpoint: Checkpoint, random_maps: Maps
) -> None:
    model = load_model(checkpoint(architecture))
    maps, ids = random_maps(1, 2), torch.arange(2, 130).view(2, 64) % VOCAB
    got = distill(model, maps, "residual", ids, ids, DistillSettings(steps=1, learning_rate=0.0))
    with torch.inference_mode():
        base = model(ids, use_cache=False).logits.log_softmax(-1)
        ours = linearize(model, maps)(ids, use_cache=False).logits.log_softmax(-1)
    assert got.held_kl[0][1] == pytest.approx((base.exp() * (base - ours)).sum(-1).mean().item(), rel=1e-4)
    np.testing.assert_allclose(got.maps[1].tensors()["weight"], maps[1].weight, atol=1e-6)


@pytest.mark.parametrize("architecture", cases(EVERY))
def test_a_saved_checkpoint_is_the_linearized_model(
    architecture: str, checkpoint: Checkpoint, random_maps: Maps, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from nbl_export.methods.checkpoint.hf_classes import save_linearized

    directory, maps = checkpoint(architecture), random_maps(0, 2)
    save_linearized(load_model(directory), directory, maps, "residual", tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model_type"].startswith("nbl-") and config["nbl_replaced_layers"] == [0, 2]
    assert config["architectures"][0].startswith("Nbl") and "auto_map" not in config
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    linearized = linearize(load_model(directory), maps)
    with torch.inference_mode():
        expected, found = (model.eval()(IDS, use_cache=False).logits for model in (linearized, loaded))
        if architecture in ("llama", "mistral-window"):  # cached steps: cache indices are dense
            told = [m.generate(IDS[:, :12], max_new_tokens=8, do_sample=False) for m in (loaded, linearized)]
            assert torch.equal(*told)
    if record_of(architecture).experts:  # transformers sums experts in an order of its own choice
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(found, expected)


def _first_of_mlp(model: Any, layer: Any) -> Any:
    """The module that reads the residual stream behind the attention block: the first one to run there."""
    record = architecture_of(model.config)
    block, ran = {"self_attn", record.norm_before, record.norm_after}, list[Any]()
    children = layer.named_children()
    behind = [child for name, child in children if name not in block and not isinstance(child, torch.nn.Dropout)]
    handles = [child.register_forward_pre_hook(lambda module, _: ran.append(module)) for child in behind]
    with torch.inference_mode():
        model(IDS)
    for handle in handles:
        handle.remove()
    return ran[0]


def _check(model: Any, **asked: Any) -> None:
    from nbl_export.options.options import JobOptions
    from nbl_export.options.rules import Case
    from nbl_export.options.settle import judge
    from nbl_export.run.settled import capabilities_of, model_facts

    options = JobOptions(model="tiny", **asked)
    engine = capabilities_of("ort")
    facts = model_facts(DecoderSpec(model.config.model_type, 3, 64, 4, 2, 16, 384, 512))
    judge(Case(options, engine, dataclasses.replace(facts, decoder=None)))
