"""The supported decoder architectures. One record holds everything special about an architecture.

    residual x --- norm before --- self_attn --- norm after --- (* multiplier) ---(+ x)--- mlp ...
                `- tap residual `- tap normed                                  `- y, what the map gives

A map replaces everything between the residual stream and the addition that ends the attention block. This is the norm
before attention (tap "residual"), attention, and, if present, the norm after attention and the multiplier. So y is
taken, and the graph joined, at the same place in every architecture. Names come from transformers: attributes of a
decoder layer, and keys of the configuration.

To add an architecture, write a record here and a tiny configuration in tests/tiny.py. bench/architectures.py then says
what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nbl_export.errors import NblError
from nbl_export.model.hybrids import SHORT_CONVOLUTION, Others
from nbl_export.records.decoder import attention_among

__all__ = [
    "ARCHITECTURES",
    "LINEARIZED",
    "Architecture",
    "attention_layers",
    "check_config",
    "check_window",
    "hybrid_facts",
    "mlp_width",
    "windows_of",
]  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Everything special about an architecture.

    Attributes:
        name: model_type of the configuration.
        classes: name of the transformers classes without Config and ForCausalLM.
        aliases: names in GGUF files.
        norm_before: the norm before attention; None if attention reads the residual stream directly.
        norm_after: the norm between attention and the addition.
        norm_mlp: the norm before the MLP; None if the MLP reads the residual stream directly.
        norm_last: the decoder's norm behind its last layer.
        norm_offset: what norms add to their weight before they multiply by it.
        multiplier: configuration key of the factor of attention's output before the addition.
        entry_multiplier: decoder attribute of the factor of the first layer's input.
        logits_divisor, logits_cap: configuration keys; logits are head(x) / divisor, then cap * tanh(logits / cap).
        score_scalar: configuration key; attention scores are divided by its square root (None: of the head size).
        embedding_root: embeddings are multiplied by the square root of the hidden size.
        tied: the head is the embedding if the configuration does not say.
        per_layer: configuration keys of lists with one value a layer.
        fused_qkv: the single projection for queries, keys and values, in this order; None for three projections.
        others: layers without attention, in a hybrid.
        width: configuration -> width of the MLP, if intermediate_size is not it.
        must_be: supported values of configuration keys.
        runtime_type: type in genai_config.json, if ONNX Runtime GenAI does not know the name.
        not_from: decoder source -> why the source exports no graph of this architecture.
    """

    name: str
    classes: str
    aliases: tuple[str, ...] = ()
    norm_before: str | None = "input_layernorm"
    norm_after: str | None = None
    norm_mlp: str | None = "post_attention_layernorm"
    norm_last: str = "norm"
    norm_offset: float = 0.0
    multiplier: str | None = None
    entry_multiplier: str | None = None
    logits_divisor: str | None = None
    logits_cap: str | None = None
    score_scalar: str | None = None
    embedding_root: bool = False
    tied: bool = False
    per_layer: tuple[str, ...] = ()
    fused_qkv: str | None = None
    others: Others | None = None
    width: Callable[[Mapping[str, Any]], int] | None = None
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    runtime_type: str | None = None
    not_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def taps(self) -> tuple[str, ...]:
        """Taps at which a map can act (`records.plan.TAPS`)."""
        return ("residual", "normed") if self.norm_before else ("residual",)


_CAUSAL = {"use_bidirectional_attention": (None, False)}


_SANDWICH: dict[str, Any] = {
    "norm_after": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_offset": 1.0,
    "logits_cap": "final_logit_softcapping",
    "score_scalar": "query_pre_attn_scalar",
    "embedding_root": True,
    "tied": True,
    "per_layer": ("layer_types",),
    "must_be": _CAUSAL,
}


_NO_STATIC_CACHE = {"static": "mobius (0.1), which it comes from, has no caches of fixed length for it"}
_NO_STATES = {
    "mobius": "mobius (0.1) does not know its layers without attention; use --decoder-source genai",
    "static": "the static form has no states of layers without attention",
}


def _lfm2_width(config: Mapping[str, Any]) -> int:
    """As `Lfm2MLP` of transformers has it."""
    width = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    block = int(config.get("block_multiple_of", 256))
    return -(-int((config.get("block_ffn_dim_multiplier") or 1.0) * int(2 * width / 3)) // block) * block


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
            norm_mlp=None,
            runtime_type="olmo",
            not_from={
                "genai": "the GenAI builder (0.18) does not know it; use --decoder-source mobius",
                **_NO_STATIC_CACHE,
            },
        ),
        Architecture(
            "smollm3", "SmolLM3", tied=True, per_layer=("layer_types", "no_rope_layers"), not_from=_NO_STATIC_CACHE
        ),
        Architecture(
            "granite",
            "Granite",
            multiplier="residual_multiplier",
            entry_multiplier="embedding_multiplier",
            logits_divisor="logits_scaling",
            not_from=_NO_STATIC_CACHE,
        ),
        Architecture(
            "lfm2",
            "Lfm2",
            norm_before="operator_norm",
            norm_mlp="ffn_norm",
            norm_last="embedding_norm",
            tied=True,
            per_layer=("layer_types",),
            others=SHORT_CONVOLUTION,
            width=_lfm2_width,
            not_from=_NO_STATES,
        ),
    )
}


def hybrid_facts(config: Any) -> dict[str, Any]:
    """The fields of `records.decoder.DecoderSpec` that hybrids have; empty for other architectures.

    Args:
        config: of transformers, or the content of config.json.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    record = ARCHITECTURES[str(values["model_type"]).removeprefix(LINEARIZED)]
    return {} if record.others is None else record.others.facts(values)


def mlp_width(config: Mapping[str, Any]) -> int:
    """Width of the MLP, from the content of config.json."""
    record = ARCHITECTURES.get(str(config.get("model_type")).removeprefix(LINEARIZED))
    return int(config["intermediate_size"] if record is None or record.width is None else record.width(config))


def attention_layers(config: Any) -> tuple[int, ...]:
    """Layers with attention, from a transformers configuration, ascending."""
    return attention_among(config.num_hidden_layers, hybrid_facts(config).get("others", ()))


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window from a transformers configuration; None for a layer that sees all tokens."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * config.num_hidden_layers
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_window(tokens: Any, positions: Any, where: object) -> None:
    """Refuse the size that a configuration gives its layers of kind window.

    Raises:
        NblError: it is no number of tokens, or is beyond the model's positions.
    """
    if type(tokens) is not int or type(positions) is not int or not 1 <= tokens <= positions:
        raise NblError(
            f"{where} has layers of kind window with nbl_window {tokens!r}, which is not 1 to {positions} tokens; "
            "save the checkpoint again"
        )


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a configuration (config.json) with values that its record does not support.

    Raises:
        NblError: names the value.
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


LINEARIZED = "nbl-"  # prefix of the architecture in an NBL checkpoint's config.json
