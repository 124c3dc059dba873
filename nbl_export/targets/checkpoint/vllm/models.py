"""vLLM's model classes with linear layers instead of attention in some layers, or with predicted KV above an exit
layer.

A stock class builds its model. Then the attention of each replaced layer goes, and its name leaves vLLM's list of
attention layers, from which caches are allocated. No forward is copied:

    vLLM's layer      hidden, residual = input_layernorm(hidden, residual);  hidden = self_attn(positions, hidden)
    tap normed        the norm stays, self_attn is a linear layer
    tap residual      the norm is `Joined`, which adds and does not scale

Values of config.json: nbl_replaced_layers, nbl_kinds (all "linear", unless given), nbl_tap, and nbl_parallel.
"replicated" (default) keeps the whole matrix on each tensor-parallel rank and needs no communication; "column" splits
its outputs and gathers them.
With nbl_exit, all layers from the exit layer up are of the kind "predicted_kv" and keep their attention: see
`vllm.predicted_kv`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.phi3 import Phi3ForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from nbl_export.methods import METHODS
from nbl_export.records.plan import PREDICTED_KV
from nbl_export.targets.checkpoint.vllm.predicted_kv import put_exit

__all__ = [
    "Joined",
    "LinearAttention",
    "Linearized",
    "NblLlamaForCausalLM",
    "NblMistralForCausalLM",
    "NblPhi3ForCausalLM",
    "NblQwen2ForCausalLM",
    "NblQwen3ForCausalLM",
]


class LinearAttention(nn.Module):
    """In place of a self-attention module: hidden W' + b."""

    def __init__(self, size: int, parallel: str, quant_config: Any, prefix: str) -> None:
        super().__init__()
        settings = {"bias": True, "quant_config": quant_config, "prefix": f"{prefix}.linear", "return_bias": False}
        if parallel == "column":
            self.linear = ColumnParallelLinear(size, size, gather_output=True, **settings)
        else:
            self.linear = ReplicatedLinear(size, size, **settings)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        return self.linear(hidden_states)


class Joined(nn.Module):
    """In place of the norm of a layer whose map acts on the residual stream: the stream itself, not scaled."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return hidden_states
        stream = hidden_states + residual
        return stream, stream


class Linearized:
    """Mixin before a stock class: replaces attention after construction, and checks that maps were loaded.

    Raises:
        ValueError: config.json names missing layers, all layers, or an unknown value; or the checkpoint has no maps.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)  # type: ignore[call-arg]
        config = vllm_config.model_config.hf_config
        replaced = config.nbl_replaced_layers or []
        count = config.num_hidden_layers
        if not replaced or not set(replaced) < set(range(count)):
            raise ValueError(f"config.json replaces layers {replaced} of {count}; convert the run again")
        if config.nbl_tap not in ("residual", "normed") or config.nbl_parallel not in ("replicated", "column"):
            raise ValueError(f"config.json has nbl_tap {config.nbl_tap!r} and nbl_parallel {config.nbl_parallel!r}")
        kinds = dict(zip(replaced, config.nbl_kinds or ["linear"] * len(replaced), strict=True))
        if config.nbl_exit:
            _check_exit(config, kinds, vllm_config)
            self._maps = put_exit(self.model.layers, config.nbl_exit, vllm_config)  # type: ignore[attr-defined]
            self.model.do_not_compile = True  # type: ignore[attr-defined]  # rows of a step are known when it runs
            return
        if not set(kinds.values()) <= {"linear"}:
            raise ValueError(f"config.json has layers of the kinds {config.nbl_kinds}; vLLM runs linear layers")
        here = {
            i: layer
            for i, layer in enumerate(self.model.layers)  # type: ignore[attr-defined]
            if not isinstance(layer, PPMissingLayer)
        }
        if set(here) <= set(replaced):
            raise ValueError(
                f"the pipeline stage of layers {min(here)} to {max(here)} has no attention, and vLLM cannot plan its "
                "caches; give it another layer by VLLM_PP_LAYER_PARTITION"
            )
        ours = [i for i in replaced if i in here]
        for i in ours:
            _exchange(here[i], config, vllm_config)
        self._maps = [f"model.layers.{i}.self_attn.linear.bias" for i in ours]  # without the prefix that a draft has

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights of this rank."""
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        missing = [name for name in self._maps if name not in loaded]
        if missing:
            raise ValueError(f"the checkpoint has no {missing[0]}, which its config.json names; convert the run again")
        return loaded


def _check_exit(config: Any, kinds: dict[int, str], vllm_config: Any) -> None:
    """Raises ValueError: vLLM does not serve this exit layer as it was started."""
    speculative = vllm_config.speculative_config
    METHODS[PREDICTED_KV].check_facts(
        config.nbl_exit, tuple(kinds), config.num_hidden_layers, config.max_position_embeddings
    )
    if set(kinds.values()) != {PREDICTED_KV}:
        raise ValueError(f"config.json has layers {kinds}, which is no exit layer; convert the run again")
    if config.model_type not in ("nbl-llama", "nbl-mistral", "nbl-qwen2"):
        raise ValueError(f"{config.model_type} has no predicted KV in vLLM; convert a run of linear layers")
    refused = {
        "pipeline stages": vllm_config.parallel_config.pipeline_parallel_size > 1,
        "a KV connector": vllm_config.kv_transfer_config is not None,
        "a draft model": speculative is not None and speculative.method not in ("ngram", "suffix"),
        "CUDA graphs": vllm_config.compilation_config.cudagraph_mode.name != "NONE",
    }
    for what in (name for name, asked in refused.items() if asked):
        advice = "start vLLM with --enforce-eager" if what == "CUDA graphs" else "start vLLM without"
        raise ValueError(f"predicted KV do not go with {what}; {advice}")


def _exchange(layer: Any, config: Any, vllm_config: VllmConfig) -> None:
    """Replace a layer's attention."""
    name = layer.self_attn.attn.layer_name  # model.layers.3.self_attn.attn
    vllm_config.compilation_config.static_forward_context.pop(name)  # no cache is allocated for it
    prefix = name.removesuffix(".attn")
    layer.self_attn = LinearAttention(config.hidden_size, config.nbl_parallel, vllm_config.quant_config, prefix)
    if config.nbl_tap == "residual":
        layer.input_layernorm = Joined()


class NblLlamaForCausalLM(Linearized, LlamaForCausalLM):
    """A Llama with linear layers."""


class NblMistralForCausalLM(Linearized, MistralForCausalLM):
    """A Mistral with linear layers."""


class NblPhi3ForCausalLM(Linearized, Phi3ForCausalLM):
    """A Phi-3 with linear layers."""


class NblQwen2ForCausalLM(Linearized, Qwen2ForCausalLM):
    """A Qwen2 with linear layers."""


class NblQwen3ForCausalLM(Linearized, Qwen3ForCausalLM):
    """A Qwen3 with linear layers."""
