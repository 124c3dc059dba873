"""The decoder architectures that are understood, each in one record: all that is special in it stands here.

    residual x --- norm before --- self_attn --- norm after --- (* multiplier) ---(+ x)--- mlp ...
                `- tap residual `- tap normed                                  `- y, what the map gives

A map stands in for everything between the residual stream and the addition that ends the attention block: the norm
in front of attention (tap "residual"), attention, and, where an architecture has them, the norm behind it and the
multiplier. So y is taken there and the graph is joined there, whatever the architecture. Names are those of
transformers: attributes of a decoder layer, values of the configuration.

To add one: a record here, a tiny configuration in tests/tiny.py, and bench/architectures.py says what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbl_export.errors import NblError
from nbl_export.records import JobOptions

__all__ = ["ARCHITECTURES", "Architecture", "check_asked", "check_config", "windows_of"]


@dataclass(frozen=True)
class Architecture:
    """What is special in one.

    name: model_type of its configuration. classes: what its classes of transformers are called, less Config and
    ForCausalLM. aliases: what GGUF files call it.
    norm_before: the norm in front of attention; None where attention reads the residual stream as it is.
    norm_after: a norm behind attention, in front of the addition.
    multiplier: configuration value that attention's output is multiplied with before the addition.
    entry_multiplier: attribute of the decoder by which it multiplies whatever enters its first layer.
    logits_divisor, logits_cap: configuration values; logits are head(x) / divisor, and cap * tanh(logits / cap).
    score_scalar: configuration value; attention scores are multiplied with one over its root (None: of a head's size).
    embedding_root: embeddings are multiplied with the root of the hidden size.
    per_layer: lists of the configuration that have a value for each layer.
    fused_qkv: the one projection that makes queries, keys and values, in this order; None where there are three.
    must_be: configuration values that are not understood unless they are one of these.
    runtime_type: what ONNX Runtime GenAI is told in genai_config.json, where it does not know the name.
    not_from: decoder source -> why it makes no graph of this architecture.
    """

    name: str
    classes: str
    aliases: tuple[str, ...] = ()
    norm_before: str | None = "input_layernorm"
    norm_after: str | None = None
    multiplier: str | None = None
    entry_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_cap: str | None = None
    score_scalar: str | None = None
    embedding_root: bool = False
    per_layer: tuple[str, ...] = ()
    fused_qkv: str | None = None
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    runtime_type: str | None = None
    not_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[str, ...]:
        """Where a map can act (`records.TAPS`)."""
        return ("residual", "normed") if self.norm_before else ("residual",)

    @property
    def affine_values(self) -> bool:
        """Attention over one token is an affine map of its input: no norm behind it."""
        return self.norm_after is None


_CAUSAL = {"use_bidirectional_attention": (None, False)}
_SANDWICH: dict[str, Any] = {
    "norm_after": "post_attention_layernorm",
    "logits_cap": "final_logit_softcapping",
    "score_scalar": "query_pre_attn_scalar",
    "embedding_root": True,
    "per_layer": ("layer_types",),
    "must_be": _CAUSAL,
}

_NO_STATIC_CACHE = {"static": "mobius (0.1), which it comes from, has no caches of fixed length for it"}

ARCHITECTURES = {
    record.name: record
    for record in (
        Architecture("llama", "Llama"),
        Architecture("mistral", "Mistral"),
        Architecture("qwen2", "Qwen2", per_layer=("layer_types",)),
        Architecture("qwen3", "Qwen3", per_layer=("layer_types",)),
        Architecture("phi3", "Phi3", fused_qkv="qkv_proj"),
        Architecture(
            "gemma2",
            "Gemma2",
            **_SANDWICH,
            not_from={
                "mobius": "mobius (0.1) does not read its configuration, and gives the window to the wrong layers",
                "static": "TensorRT has no soft cap for attention scores",
            },
        ),
        Architecture("gemma3_text", "Gemma3", aliases=("gemma3",), **_SANDWICH, not_from=_NO_STATIC_CACHE),
        Architecture(
            "olmo2",
            "Olmo2",
            norm_before=None,
            norm_after="post_attention_layernorm",
            runtime_type="olmo",
            not_from={
                "genai": "the GenAI builder (0.18) does not know it; use --decoder-source mobius",
                **_NO_STATIC_CACHE,
            },
        ),
        Architecture("smollm3", "SmolLM3", per_layer=("layer_types", "no_rope_layers"), not_from=_NO_STATIC_CACHE),
        Architecture(
            "granite",
            "Granite",
            multiplier="residual_multiplier",
            entry_multiplier="embedding_multiplier",
            logits_divisor="logits_scaling",
            not_from=_NO_STATIC_CACHE,
        ),
    )
}


def windows_of(config: Any) -> tuple[int | None, ...]:
    """The sliding window of each layer from a transformers configuration, None where a layer sees everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * config.num_hidden_layers
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse what a configuration (config.json) asks for and the record does not understand.

    Raises:
        NblError: which value.
    """
    record = ARCHITECTURES[str(config["model_type"])]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and "dynamic" in (rope.get("rope_type"), rope.get("type")):
        raise NblError(
            f"{where} has rotary embeddings of type 'dynamic', which is not supported: they depend on the length of "
            "the sequence, and a graph has one table"
        )
    for name, understood in record.must_be.items():
        if config.get(name) not in understood:
            raise NblError(
                f"{where} has {name} {config[name]!r}, which is not supported for {record.name}: "
                f"an affine map stands in for causal attention with {name} {understood[-1]!r}"
            )


def check_asked(options: JobOptions, architecture: str) -> None:
    """Hold what is asked against the architecture, before anything is computed.

    Raises:
        NblError: a tap that it does not have, a method that is not affine in it, a source that does not make it; or no
            such architecture, where somebody has edited the manifest.
    """
    if architecture not in ARCHITECTURES:
        raise NblError(f"architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    record = ARCHITECTURES[architecture]
    if options.tap not in record.taps:
        raise NblError(
            f"--tap {options.tap} is not possible for {architecture}: no norm stands in front of its attention; "
            f"use --tap {record.taps[0]}"
        )
    if options.method == "wo-wv" and not record.affine_values:
        raise NblError(
            f"--method wo-wv is not possible for {architecture}: a norm stands behind its attention, so what it gives "
            "for one token is no affine map; use --method nbl or drop"
        )
    if options.decoder_source in record.not_from:
        raise NblError(
            f"--decoder-source {options.decoder_source} is not possible for {architecture}: "
            f"{record.not_from[options.decoder_source]}"
        )
