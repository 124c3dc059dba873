"""`convert --to edge-llm`: the directory by our own reading, and its code on a stand-in of TensorRT-Edge-LLM.

The stand-in has the signatures of version 0.11 (models/default/modeling_default.py). `tests/engines/test_edge_llm.py`
runs the package itself.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.targets.checkpoint import edge_llm

from ..command import nbl
from ..tiny import HIDDEN, LAYERS, random_map, save_checkpoint

pytestmark = pytest.mark.job

IDS = torch.arange(3, 40)[None]
MAPS: dict[int, Mixer] = {1: random_map(1), 2: Linear.zeros(HIDDEN)}
PREDICTED = PredictedKV(np.zeros((4, 2 * HIDDEN), np.float32), np.zeros(4, np.float32), HIDDEN, 1, 8, 1e-5)


def saved(architecture: str, maps: dict[int, Mixer], tap: str, home: Path, **changes: Any) -> Path:
    checkpoint = save_checkpoint(architecture, home / "model", **changes)
    edge_llm.save(load_model(checkpoint), checkpoint, maps, tap, home / "out")
    return home / "out"


@pytest.mark.parametrize("tap", ["normed", "residual"])
@pytest.mark.parametrize("architecture", edge_llm.ARCHITECTURES)
def test_a_directory_is_the_same_model_in_float16(architecture: str, tap: str, tmp_path: Path) -> None:
    out = saved(architecture, MAPS, tap, tmp_path)
    expected = linearize(load_model(tmp_path / "model"), MAPS, tap)
    with torch.inference_mode():
        for parameter in expected.parameters():
            parameter.copy_(parameter.half())
        assert torch.equal(edge_llm.load(out)(IDS).logits, expected(IDS).logits)
    weights = load_file(out / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float16)}
    assert ("model.layers.1.input_layernorm.weight" in weights) == (tap == "normed")
    assert not [n for n in weights if re.search(r"\.[12]\.self_attn\.(?!linear)", n)]
    config = json.loads((out / "config.json").read_text())
    assert config["layers_block_type"] == ["attention", f"mlp_{tap}", f"mlp_{tap}"]
    assert config["num_hidden_layers"] == LAYERS and config["rope_theta"] == 10_000.0 and config["head_dim"] == 16


def test_convert_writes_it_and_says_what_edge_llm_asks_for(run: Path) -> None:
    out = run.with_name("edge")
    done = nbl("convert", run, "--to", "tensorrt-edge-llm", "--output", out)
    assert done.status == 0, done.err
    assert "largest difference of a log-probability: 0" in done.err
    assert "Edge-LLM's exporter asks for a chat template, and the tokenizer has none." in done.err
    assert "mlp_residual" in json.loads((out / "config.json").read_text())["layers_block_type"]


@pytest.mark.parametrize(
    ("architecture", "changes", "maps", "part"),
    [("gemma3", {}, MAPS, "and not gemma3_text"), ("mistral-window", {}, MAPS, "a sliding window"),
     ("llama-yarn", {}, MAPS, "rotary embeddings of type yarn"), ("llama", {"mlp_bias": True}, MAPS, "biases of this"),
     ("llama", {}, {1: PREDICTED}, "no place for layers of kind predicted"),
     ("llama", {"hidden_act": "gelu"}, MAPS, "silu, and this model's have gelu"),
     ("llama", {}, {1: Linear(np.full((HIDDEN, HIDDEN), 7e4, np.float32), np.zeros(HIDDEN, np.float32))},
      "layers.1.self_attn.linear.weight has numbers above 65,504")],
)  # fmt: skip
def test_what_edge_llm_cannot_hold(
    architecture: str, changes: dict[str, Any], maps: dict[int, Mixer], part: str, tmp_path: Path
) -> None:
    with pytest.raises(NblError, match=part):
        saved(architecture, maps, "normed", tmp_path, **changes)
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_matrix(tmp_path: Path) -> None:
    out = saved("llama", MAPS, "normed", tmp_path)
    weights = load_file(out / "model.safetensors")
    weights.pop("model.layers.1.self_attn.linear.weight")
    save_file(weights, out / "model.safetensors")
    with pytest.raises(CorruptError, match=r"lacks model.layers.1.self_attn.linear.weight"):
        edge_llm.load(out)


def test_llama3_is_said_to_lose_its_scaling(tmp_path: Path) -> None:
    said = edge_llm.remarks(saved("llama3", MAPS, "normed", tmp_path))
    assert any("type llama3 without their scaling" in sentence for sentence in said)


# -- the code beside the weights, on a stand-in ----------------------------------------------------------


class _Attention(nn.Module):
    """Adds what its cache holds, and counts in it."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(1, 1)

    def forward_ragged(self, hidden_states: torch.Tensor, past_key_value: Any, **_: Any) -> Any:
        return torch.zeros_like(hidden_states) + past_key_value, past_key_value + 1


class _Layer(nn.Module):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.self_attn, self.input_layernorm = _Attention(), nn.Hardtanh()

    def forward_ragged(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        mixed, present = self.self_attn.forward_ragged(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + mixed, present


class _Transformer(nn.Module):
    decoder_layer_cls = _Layer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            self.decoder_layer_cls(config, layer_idx=i) for i in range(config.num_hidden_layers)
        )

    def forward_ragged(self, inputs_embeds: torch.Tensor, past_key_values: Any, *_args: Any, **kwargs: Any) -> Any:
        present = []
        for index, layer in enumerate(self.layers):
            inputs_embeds, cache = layer.forward_ragged(inputs_embeds, past_key_value=past_key_values[index], **kwargs)
            present.append(cache)
        return inputs_embeds, tuple(present)


class _CausalLM(nn.Module):
    transformer_cls = _Transformer

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.model = config, self.transformer_cls(config)

    def onnx_export_spec(self) -> Any:
        return self.config.num_hidden_layers  # as many caches as its graph has


class _FP16Linear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)


@dataclass
class _Config:
    """Of Edge-LLM's ModelConfig."""

    raw_layer_types: list[str]
    num_hidden_layers: int
    num_attn_layers: int
    hidden_size: int = HIDDEN


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Model classes that code has registered with the stand-in."""
    found: dict[str, Any] = {}
    edge, default = ModuleType("tensorrt_edgellm"), ModuleType("tensorrt_edgellm.models.default.modeling_default")
    edge.__dict__.update(__version__="0.11.0", register_model=lambda name, made, scale: found.update({name: made}))
    members = {"FP16Linear": _FP16Linear, "DecoderLayer": _Layer, "Transformer": _Transformer, "CausalLM": _CausalLM}
    default.__dict__.update(members)
    parents = {name: ModuleType(name) for name in ("tensorrt_edgellm.models", "tensorrt_edgellm.models.default")}
    parents["tensorrt_edgellm.models.default"].modeling_default = default  # type: ignore[attr-defined]
    for name, module in {edge.__name__: edge, default.__name__: default, **parents}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_the_code_registers_a_model_with_fewer_caches(registered: dict[str, Any], tmp_path: Path) -> None:
    """As the exporter does it: transformers reads config.json, and runs the code that is named there."""
    from transformers import AutoConfig

    out = saved("llama", MAPS, "residual", tmp_path)
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    types = config.layers_block_type
    model = registered[config.model_type](_Config(types, LAYERS, 1))
    with pytest.raises(ValueError, match="the checkpoint has no map of layer 1"):
        model.onnx_export_spec()  # the loader has found no weights
    for layer, mixer in MAPS.items():
        given = {name: torch.from_numpy(value) for name, value in mixer.tensors().items()}
        model.model.layers[layer].self_attn.linear.load_state_dict(given)
    linear = model.model.layers[1].self_attn.linear
    assert model.onnx_export_spec() == 1 and model.config.num_hidden_layers == LAYERS
    stream = 3 * torch.randn(5, HIDDEN)
    hidden, present = model.model.forward_ragged(stream, (torch.tensor(2.0),))
    assert [float(cache) for cache in present] == [3.0]
    assert torch.equal(hidden, stream + 2 + linear(stream + 2))  # the stream, not its norm; layer 2 adds nothing
