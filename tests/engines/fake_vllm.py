"""A vLLM whose Llama is made of the modules of transformers, joined as vLLM joins them.

    layer    hidden, residual = input_layernorm(hidden, residual);  hidden = self_attn(positions, hidden)
             hidden, residual = post_attention_layernorm(hidden, residual);  hidden = mlp(hidden)

As in vLLM 0.32 (model_executor/models/llama.py), a norm adds the residual before it scales. The first layer has none.
It has one rank, no scheduler and no cache: what it says of `nbl_export.targets.checkpoint.vllm.models` is what a
forward computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

__all__ = ["ColumnParallelLinear", "Llama", "PPMissingLayer", "ReplicatedLinear", "install", "vllm_config"]


class _Linear(nn.Linear):
    """As vLLM's, gives the bias apart unless it is told not to; keeps what it was made with."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, return_bias: bool = True, **settings: Any) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.return_bias, self.settings = return_bias, settings

    def forward(self, hidden: torch.Tensor) -> Any:
        found = super().forward(hidden)
        return (found, None) if self.return_bias else found


class ReplicatedLinear(_Linear):
    pass


class ColumnParallelLinear(_Linear):
    pass


class PPMissingLayer(nn.Identity):
    """In place of a layer of another pipeline stage."""


class _Norm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return self.norm(hidden)
        residual = hidden + residual
        return self.norm(residual), residual


class _Attention(nn.Module):
    def __init__(self, attention: nn.Module, rotary: nn.Module, name: str, context: dict[str, Any]) -> None:
        super().__init__()
        self.theirs, self.rotary = attention, rotary
        self.attn = SimpleNamespace(layer_name=name)
        context[name] = self.attn

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        embeddings = self.rotary(hidden_states, positions[None])
        found: torch.Tensor = self.theirs(hidden_states, position_embeddings=embeddings, attention_mask=None)[0]
        return found


class _Layer(nn.Module):
    def __init__(self, theirs: Any, attention: _Attention) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention, theirs.mlp
        self.input_layernorm = _Norm(theirs.input_layernorm)
        self.post_attention_layernorm = _Norm(theirs.post_attention_layernorm)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        if residual is None:
            residual, hidden = hidden, self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions=positions, hidden_states=hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Llama(nn.Module):
    """`LlamaForCausalLM` of one rank; layers that the configuration calls elsewhere are missing."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.theirs, context = vllm_config.theirs, vllm_config.compilation_config.static_forward_context
        inner, name = self.theirs.model, f"{prefix}.model" if prefix else "model"
        self.model, self.norm = nn.Module(), _Norm(inner.norm)
        self.model.layers = nn.ModuleList(
            PPMissingLayer() if i in vllm_config.elsewhere else _Layer(
                layer,
                _Attention(layer.self_attn, inner.rotary_emb, f"{name}.layers.{i}.self_attn.attn", context),
            )
            for i, layer in enumerate(inner.layers)
        )  # fmt: skip

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.theirs.model.embed_tokens(ids[None]), None
        for layer in self.model.layers:
            hidden, residual = layer(torch.arange(len(ids)), hidden, residual)
        found: torch.Tensor = self.theirs.lm_head(self.norm(hidden, residual)[0])
        return found

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = dict(self.named_parameters()), set()
        with torch.no_grad():
            for name, value in weights:
                own[name].copy_(value)
                loaded.add(name)
        return loaded


def vllm_config(theirs: Any, *, elsewhere: Iterable[int] = (), **settings: Any) -> Any:
    """What vLLM hands to a model. `theirs`: the model of transformers. `settings` are of config.json."""
    defaults = {"nbl_kinds": None, "nbl_tap": "residual", "nbl_parallel": "replicated"}
    facts = {"num_hidden_layers": len(theirs.model.layers), "hidden_size": theirs.config.hidden_size}
    return SimpleNamespace(
        theirs=theirs, elsewhere=set(elsewhere), quant_config="as asked",
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**{**facts, **defaults, **settings})),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )  # fmt: skip


def install(patch: pytest.MonkeyPatch) -> None:
    """Make `import vllm` find this, with the names that `nbl_export.targets.checkpoint.vllm.models` imports."""
    stock = ("llama", "mistral", "phi3", "qwen2", "qwen3")
    content: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.config": {"VllmConfig": object}, "vllm.model_executor": {},
        "vllm.model_executor.layers": {}, "vllm.model_executor.models": {},
        "vllm.model_executor.layers.linear": {
            "ColumnParallelLinear": ColumnParallelLinear, "ReplicatedLinear": ReplicatedLinear
        },
        "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
        **{f"vllm.model_executor.models.{name}": {f"{name.capitalize()}ForCausalLM": Llama} for name in stock},
    }  # fmt: skip
    for name, names in content.items():
        module = ModuleType(name)
        vars(module).update(names)
        patch.setitem(sys.modules, name, module)
