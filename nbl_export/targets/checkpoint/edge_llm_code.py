"""An NBL model in TensorRT-Edge-LLM; written by nbl-export beside the weights, and run by its exporter.

The exporter executes the code that config.json names (`auto_map`). This file then registers a model class by the
package's own function `register_model`: Edge-LLM's decoder, with a linear layer in place of some attention.

    layers_block_type    "attention", "mlp_normed" or "mlp_residual" (a map of the normed input, or of the stream);
                         Edge-LLM takes a type with "mlp" in it for a layer without a cache
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PretrainedConfig

__all__ = ["MODEL_TYPE", "NblEdgeConfig"]

MODEL_TYPE = "nbl_edge_llm"
_TESTED = "0.11."


class NblEdgeConfig(PretrainedConfig):
    """The values of config.json as they are."""

    model_type = MODEL_TYPE


def _layer_class(default: Any) -> Any:
    """A decoder layer that may have a linear layer or nothing in place of attention."""
    import torch
    from torch import nn

    class LinearAttention(nn.Module):
        """In place of a self-attention module: x W' + b, and no cache."""

        def __init__(self, size: int) -> None:
            super().__init__()
            self.linear = default.FP16Linear(size, size, bias=True)
            nn.init.constant_(self.linear.weight, float("nan"))  # the loader says nothing of what a file lacks

        def forward_ragged(self, hidden_states: torch.Tensor, **_kwargs: Any) -> tuple[torch.Tensor, None]:
            return self.linear(hidden_states), None

    class Layer(default.DecoderLayer):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            kind = config.raw_layer_types[layer_idx]
            if kind == "attention":
                return
            self.self_attn = LinearAttention(config.hidden_size)
            if kind == "mlp_residual":
                self.input_layernorm = nn.Identity()

    return Layer


def _model_class(default: Any) -> Any:
    """Edge-LLM's decoder whose caches are those of the layers with attention."""
    import dataclasses

    import torch

    class Transformer(default.Transformer):
        decoder_layer_cls = _layer_class(default)

        def forward_ragged(self, inputs_embeds: torch.Tensor, past_key_values: Any, *args: Any, **kwargs: Any) -> Any:
            given = iter(past_key_values)
            caches = [next(given) if hasattr(layer.self_attn, "o_proj") else None for layer in self.layers]
            hidden, present = super().forward_ragged(inputs_embeds, caches, *args, **kwargs)
            return hidden, tuple(cache for cache in present if cache is not None)

    class CausalLM(default.CausalLM):
        transformer_cls = Transformer

        def onnx_export_spec(self) -> Any:
            for index, layer in enumerate(self.model.layers):
                linear = getattr(layer.self_attn, "linear", None)
                if linear is not None and not torch.isfinite(linear.weight).all():
                    raise ValueError(f"the checkpoint has no map of layer {index}; convert the run again")
            whole: Any = self.config
            self.config: Any = dataclasses.replace(whole, num_hidden_layers=whole.num_attn_layers)  # as many caches
            try:
                return super().onnx_export_spec()
            finally:
                self.config = whole

    return CausalLM


def _register(edge: Any, default: Any) -> None:
    """Tell Edge-LLM the model class."""
    if not edge.__version__.startswith(_TESTED):
        warnings.warn(f"tested with TensorRT-Edge-LLM {_TESTED}x, and this is {edge.__version__}", stacklevel=2)
    edge.register_model(MODEL_TYPE, _model_class(default), lambda head_dim: head_dim**-0.5)


try:
    import tensorrt_edgellm
    from tensorrt_edgellm.models.default import modeling_default
except ImportError:  # transformers reads config.json without it
    pass
else:
    _register(tensorrt_edgellm, modeling_default)
