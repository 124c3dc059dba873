"""The record of an architecture: everything special about it.

    residual x --- norm before --- self_attn --- norm after --- (* multiplier) ---(+ x)--- mlp ...
                `- tap residual `- tap normed                                  `- y, what the map gives

A map replaces everything between the residual stream and the addition that ends the attention block. This is the norm
before attention (tap "residual"), attention, and, if present, the norm after attention and the multiplier. So y is
taken, and the graph joined, at the same place in every architecture. Names come from transformers: attributes of a
decoder layer, and keys of the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Architecture", "Experts"]


@dataclass(frozen=True)
class Experts:
    """Configuration keys of the sizes of a layer's experts, and names of their weights in a checkpoint.

    Attributes:
        width: of a routed expert.
        shared: width of the expert that every token takes.
        stored: end of a weight's name -> ends of the names of its parts in a checkpoint, one behind the other. A part
            of a name with {} has one matrix for each expert.
    """

    width: str = "intermediate_size"
    shared: str | None = None
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """Everything special about an architecture.

    Attributes:
        name: model_type of the configuration.
        classes: name of the transformers classes without Config and ForCausalLM.
        aliases: names in GGUF files.
        norm_before: the norm before attention; None if attention reads the residual stream directly.
        norm: of the norm before attention: `rms` multiplies by its weight, `rms+1` by its weight plus one, and `layer`
            subtracts the mean.
        norm_after: the norm between attention and the addition.
        mlp_gated: whether the MLP has a product of the gate.
        mlp_width: configuration key of the MLP's width.
        experts: configuration keys of its experts, if it has any.
        multiplier: configuration key of the factor of attention's output before the addition.
        entry_multiplier: decoder attribute of the factor of the first layer's input.
        logits_divisor, logits_cap: configuration keys; logits are head(x) / divisor, then cap * tanh(logits / cap).
        score_scalar: configuration key; attention scores are divided by its square root (None: of the head size).
        embedding_root: embeddings are multiplied by the square root of the hidden size.
        tied: the head is the embedding if the configuration does not say.
        fused_qkv: the single projection for queries, keys and values, in this order; None for three projections.
        must_be: supported values of configuration keys.
        unfit: configuration -> why a model of this architecture is not supported; empty if it is.
        runtime_type: type in genai_config.json, if ONNX Runtime GenAI does not know the name.
        genai_as: the class whose builder in ONNX Runtime GenAI makes the graph, if the builder does not know the name.
        mobius: settings of mobius' configuration that mobius (0.1) reads wrong.
        tried: the real model that whole jobs ran on; tests use tiny random ones.
        not_from: decoder source -> why the source exports no graph of this architecture.
        no_exit: decoder source -> why its graphs of this architecture take no exit layer.
    """

    name: str
    classes: str
    aliases: tuple[str, ...] = ()
    norm_before: str | None = "input_layernorm"
    norm: str = "rms"
    norm_after: str | None = None
    mlp_gated: bool = True
    mlp_width: str = "intermediate_size"
    experts: Experts | None = None
    multiplier: str | None = None
    entry_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_cap: str | None = None
    score_scalar: str | None = None
    embedding_root: bool = False
    tied: bool = False
    fused_qkv: str | None = None
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unfit: Callable[[Mapping[str, Any]], str] | None = None
    runtime_type: str | None = None
    genai_as: str | None = None
    mobius: Mapping[str, Any] = field(default_factory=dict)
    tried: str = ""
    not_from: Mapping[str, str] = field(default_factory=dict)
    no_exit: Mapping[str, str] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[str, ...]:
        """Taps at which a map can act (`records.plan.TAPS`)."""
        return ("residual", "normed") if self.norm_before else ("residual",)

    @property
    def mlp_key(self) -> str:
        """Configuration key of the width of its MLP, or of an expert."""
        return self.experts.width if self.experts else self.mlp_width
