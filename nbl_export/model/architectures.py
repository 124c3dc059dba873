"""The supported decoder architectures: a record of each (`architecture_record`), and what a configuration says by it.

To add an architecture, write a record here and a tiny configuration in tests/tiny.py. bench/architectures.py then says
what is missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from nbl_export.errors import NblError
from nbl_export.model.architecture_record import Architecture, Experts
from nbl_export.records.mlp import MlpSpec

__all__ = [
    "ARCHITECTURES",
    "LINEARIZED",
    "REFUSED",
    "architecture_of",
    "block_modules",
    "check_config",
    "exits_refused",
    "is_hybrid",
    "mlp_of",
    "supported_near",
    "windows_of",
]


_CAUSAL = {"use_bidirectional_attention": (None, False)}


_SANDWICH: dict[str, Any] = {
    "norm": "rms+1",
    "norm_after": "post_attention_layernorm",
    "logits_cap": "final_logit_softcapping",
    "score_scalar": "query_pre_attn_scalar",
    "embedding_root": True,
    "tied": True,
    "must_be": _CAUSAL,
}


_NOT_GENAI = {"genai": "the GenAI builder (0.18) does not know it; use the key decoder_source = 'mobius'"}
_NO_STATIC_EXPERTS = {"static": "the form for TensorRT has no experts"}
# Names of the weights of experts (`Experts.stored`).
_QWEN = {
    "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
}
_MIXTRAL = {
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
    "mlp.router.weight": ("block_sparse_moe.gate.weight",),
}
_EXPERTS_OF_GRANITE = {
    "block_sparse_moe.experts.gate_up_proj": ("block_sparse_moe.input_linear.weight",),
    "block_sparse_moe.experts.down_proj": ("block_sparse_moe.output_linear.weight",),
    "block_sparse_moe.router.weight": ("block_sparse_moe.router.layer.weight",),
}
_EXPERTS = {**_NOT_GENAI, **_NO_STATIC_EXPERTS}
_POST_NORM: dict[str, Any] = {"norm_before": None, "norm_after": "post_attention_layernorm"}
_GRANITE: dict[str, Any] = {
    "multiplier": "residual_multiplier",
    "entry_multiplier": "embedding_multiplier",
    "logits_divisor": "logits_scaling",
}
_PAIRS = {"rope_interleave": True}  # neighbours form the pairs of the rotary embedding
_NO_OUTPUT_BIAS = {"attn_o_bias": False}  # attention_bias is of queries, keys and values alone


_NO_STATIC_CACHE = {"static": "mobius (0.1), which it comes from, has no caches of fixed length for it"}


def _beyond_genai(config: Mapping[str, Any]) -> str:
    """Why a Granite 4.0 with attention in every layer is not supported; "" if it is."""
    if config.get("num_local_experts", 8) != 0:  # transformers' default
        return "it has experts, and the GenAI builder (0.18) makes its shared MLP alone"
    rotated = config.get("position_embedding_type") == "rope"
    return "" if rotated else "its attention has no rotation, and the GenAI builder (0.18) rotates"


def _neither(reason: str) -> dict[str, str]:
    """Why neither mobius nor the static form, which comes from it, exports an architecture."""
    return {"mobius": reason, "static": reason}


_NORMS_HEADS = {"openvino": "it norms the keys of all heads together"}
_MOBIUS_ALONE = {**_NOT_GENAI, **_NO_STATIC_CACHE}


ARCHITECTURES = {
    record.name: record
    for record in (
        Architecture("llama", "Llama", tried="SmolLM2-135M-Instruct"),
        Architecture("mistral", "Mistral"),
        Architecture("qwen2", "Qwen2", tried="Qwen2.5-Coder-0.5B"),
        Architecture("qwen3", "Qwen3"),
        Architecture("phi3", "Phi3", fused_qkv="qkv_proj"),
        Architecture(
            "gemma2",
            "Gemma2",
            **_SANDWICH,
            not_from={
                "mobius": "mobius (0.1) does not read its configuration, and gives the window to the wrong layers",
                "static": "TensorRT has no soft cap for attention scores",
            },
            no_exit={"openvino": "OpenVINO's graph of it caps scores outside of its attention"},
        ),
        Architecture("gemma3_text", "Gemma3", aliases=("gemma3",), **_SANDWICH, not_from=_NO_STATIC_CACHE),
        Architecture("olmo2", "Olmo2", **_POST_NORM, runtime_type="olmo", not_from=_MOBIUS_ALONE, no_exit=_NORMS_HEADS),
        Architecture("smollm3", "SmolLM3", tied=True, not_from=_NO_STATIC_CACHE),
        Architecture("granite", "Granite", **_GRANITE, not_from=_NO_STATIC_CACHE),
        Architecture(
            "granitemoehybrid",
            "GraniteMoeHybrid",
            **_GRANITE,
            mlp_width="shared_intermediate_size",
            unfit=_beyond_genai,
            not_from=_neither("mobius (0.1) leaves out its rotation, and multipliers of embeddings and logits"),
        ),
        Architecture("olmo", "Olmo", norm="layer", not_from=_NO_STATIC_CACHE),
        Architecture("olmo3", "Olmo3", runtime_type="olmo", **_POST_NORM, not_from=_MOBIUS_ALONE, no_exit=_NORMS_HEADS),
        Architecture("ministral", "Ministral", runtime_type="llama", genai_as="Mistral"),
        Architecture(
            "ministral3",
            "Ministral3",
            runtime_type="llama",
            not_from={**_NOT_GENAI, "static": "the form for TensorRT has no rotation that grows with the position"},
        ),
        Architecture("nemotron", "Nemotron", norm="layer", mlp_gated=False),
        Architecture("ernie4_5", "Ernie4_5", tied=True, mobius=_PAIRS),
        Architecture(
            "hunyuan_v1_dense",
            "HunYuanDenseV1",
            no_exit={"genai": "it norms keys behind their rotation"},
            not_from=_neither("mobius (0.1) norms queries and keys before it rotates them"),
        ),
        Architecture("glm", "Glm", runtime_type="llama", mobius=_NO_OUTPUT_BIAS, not_from=_NOT_GENAI),
        Architecture(
            "glm4",
            "Glm4",
            runtime_type="llama",
            norm_after="post_self_attn_layernorm",
            mobius=_NO_OUTPUT_BIAS,
            not_from=_NOT_GENAI,
        ),
        Architecture(
            "exaone4",
            "Exaone4",
            **_POST_NORM,
            not_from={
                "genai": "the GenAI builder (0.18) does not know it; use --engine openvino",
                **_neither("mobius (0.1) rotates the layers that have no rotation; use --engine openvino"),
            },
        ),
        Architecture("seed_oss", "SeedOss", runtime_type="llama", genai_as="Llama", mobius=_NO_OUTPUT_BIAS),
        Architecture(
            "apertus",
            "Apertus",
            runtime_type="llama",
            norm_before="attention_layernorm",
            mlp_gated=False,
            not_from=_NOT_GENAI,
        ),
        Architecture(
            "stablelm",
            "StableLm",
            norm="layer",
            runtime_type="llama",
            must_be={"use_parallel_residual": (None, False)},
            not_from=_NOT_GENAI,
        ),
        Architecture(
            "starcoder2",
            "Starcoder2",
            norm="layer",
            runtime_type="llama",
            tied=True,
            mlp_gated=False,
            not_from=_NOT_GENAI,
        ),
        Architecture(
            "gemma", "Gemma", norm="rms+1", embedding_root=True, tied=True, must_be=_CAUSAL, not_from=_NO_STATIC_CACHE
        ),
        Architecture("arcee", "Arcee", runtime_type="llama", mlp_gated=False, not_from=_NOT_GENAI),
        Architecture("helium", "Helium", runtime_type="llama", genai_as="Ernie4_5", mobius=_PAIRS),
        Architecture("cwm", "Cwm", genai_as="Llama", not_from=_neither("mobius (0.1) does not know it")),
        Architecture(
            "qwen3_moe",
            "Qwen3Moe",
            runtime_type="llama",
            must_be={"mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)},
            experts=Experts("moe_intermediate_size", stored=_QWEN),
            not_from=_EXPERTS,
        ),
        Architecture(
            "qwen2_moe",
            "Qwen2Moe",
            runtime_type="llama",
            must_be={"mlp_only_layers": (None, []), "decoder_sparse_step": (None, 1)},
            experts=Experts("moe_intermediate_size", "shared_expert_intermediate_size", _QWEN),
            not_from=_EXPERTS,
        ),
        Architecture("olmoe", "Olmoe", runtime_type="olmo", experts=Experts(stored=_QWEN), not_from=_EXPERTS),
        Architecture(
            "granitemoe",
            "GraniteMoe",
            runtime_type="llama",
            **_GRANITE,
            experts=Experts(stored=_EXPERTS_OF_GRANITE),
            not_from=_EXPERTS,
        ),
        Architecture(
            "gpt_oss",
            "GptOss",
            runtime_type="llama",
            experts=Experts(),
            not_from=_NO_STATIC_EXPERTS,
            no_exit={"mobius": "mobius (0.1) writes its attention in many nodes"},
        ),
        Architecture(
            "phimoe",
            "Phimoe",
            norm="layer",
            must_be={"num_experts_per_tok": (None, 2)},  # its router chooses two, whatever the configuration says
            experts=Experts(stored=_MIXTRAL),
            not_from=_EXPERTS,
        ),
        Architecture("mixtral", "Mixtral", runtime_type="llama", experts=Experts(stored=_MIXTRAL), not_from=_EXPERTS),
    )
}


_COUNTS = ("num_local_experts", "num_experts")  # transformers writes one for the other
_HYBRIDS = (
    *("bamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5"),
    *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "zamba", "zamba2"),
    *("granitehybrid", "kimi-linear", "lfm2moe", "plamo2", "qwen35", "qwen35moe", "qwen3next"),  # in GGUF files
)
_NO_ATTENTION = {"conv", "linear_attention", "mamba", "recurrent"}  # in layer_types
_BESIDE = "its MLP runs beside its attention, and a map has no place between them"
REFUSED = {
    "falcon_h1": "attention and a Mamba block run side by side in its layers, and no addition joins attention alone",
    "gemma4_text": "its layers have heads of two sizes, share caches, and read inputs of their own",
    **dict.fromkeys(("phi", "cohere", "cohere2", "gpt_neox", "gptj", "falcon"), _BESIDE),
}


def mlp_of(config: Mapping[str, Any]) -> MlpSpec:
    """Sizes of the MLPs from a configuration (config.json); an unknown architecture has gated ones.

    Raises:
        KeyError, TypeError, ValueError: the configuration does not state them.
    """
    record = ARCHITECTURES.get(str(config.get("model_type")).removeprefix(LINEARIZED))
    width = config[record.mlp_key if record else "intermediate_size"]
    if record is None or record.experts is None:
        return MlpSpec(width, 3 if record is None or record.mlp_gated else 2)
    keys = record.experts
    shared = config[keys.shared] if keys.shared else 0
    count = next((config[key] for key in _COUNTS if key in config), None)
    if type(count) is not int or count < 1:
        raise ValueError("it states no number of experts")
    return MlpSpec(width, 3, count, config["num_experts_per_tok"], shared)


def is_hybrid(config: Mapping[str, Any]) -> bool:
    """Whether some layers of a model have no attention, by its configuration (config.json)."""
    name = str(config.get("model_type")).removeprefix(LINEARIZED)
    inner = config.get("text_config")
    kinds = config.get("layer_types") or (("mamba",) if name == "granitemoehybrid" else ())  # transformers' default
    return (
        name in _HYBRIDS
        or (isinstance(kinds, Sequence) and any(kind in _NO_ATTENTION for kind in kinds if isinstance(kind, str)))
        or (isinstance(inner, Mapping) and is_hybrid(inner))
    )


def architecture_of(config: Any) -> Architecture:
    """The record of a transformers configuration, also of a linearized model's."""
    return ARCHITECTURES[config.model_type.removeprefix(LINEARIZED)]


# Whose attention the passes of the static form, and vLLM's plugin, read.
_PLAIN = ("llama", "mistral", "qwen2")
_OF_PLAIN = ("static", "vllm")


def exits_refused(architecture: str, *, has_window: bool) -> dict[str, str]:
    """Decoder source, or vllm -> why an architecture takes no exit layer there; others are left out."""
    record = ARCHITECTURES[architecture]
    found = {"openvino": "its experts in OpenVINO take the rows of a whole step"} if record.experts else {}
    if architecture not in _PLAIN:
        found |= dict.fromkeys(_OF_PLAIN, f"its attention is not that of {', '.join(_PLAIN)}")
    elif has_window:
        found |= dict.fromkeys(_OF_PLAIN, "its attention has a sliding window")
    return {**found, **record.no_exit}


def windows_of(config: Any) -> tuple[int | None, ...]:
    """Each layer's sliding window from a transformers configuration; None for a layer that sees all tokens."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * config.num_hidden_layers
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_config(config: Mapping[str, Any], where: object) -> None:
    """Refuse a configuration (config.json) with values that its record does not support.

    Raises:
        NblError: names the value.
    """
    record = ARCHITECTURES[str(config["model_type"])]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_length = "alpha" not in rope  # with it, HunYuan has one table
    if isinstance(rope, Mapping) and by_length and "dynamic" in (rope.get("rope_type"), rope.get("type")):
        raise NblError(
            f"{where} has rotary embeddings of type 'dynamic', which is not supported: they depend on the length of "
            "the sequence, and a graph has one table"
        )
    if record.unfit is not None and (why := record.unfit(config)):
        raise NblError(f"{where} is a {record.name} that is not supported: {why}")
    for name, understood in record.must_be.items():
        if config.get(name) not in understood:
            raise NblError(
                f"{where} has {name} {config[name]!r}, which is not supported for {record.name}: "
                f"supported is {understood[-1]!r}"
            )


LINEARIZED = "nbl-"  # prefix of the architecture in an NBL checkpoint's config.json


def supported_near(architecture: object) -> str:
    """How many architectures are supported, and up to three whose names are similar, for a refusal."""
    similar = difflib.get_close_matches(str(architecture), ARCHITECTURES, 3)
    such = f", such as {' and '.join(similar)}" if similar else ""
    return f"{len(ARCHITECTURES)} are, which README.md lists{such}"


def block_modules(config: Any, tap: str) -> tuple[str, ...]:
    """Names of the norms that a layer's map replaces along with attention."""
    record = architecture_of(config)
    before = (record.norm_before,) if tap == "residual" else ()
    return tuple(name for name in (*before, record.norm_after) if name is not None)
