"""Tiny random decoders with a trained byte-pair tokenizer: for tests and for graphs/render.py. No network."""

from __future__ import annotations

import functools
import json
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.methods.linear.maps import Linear
from nbl_export.model.architecture_record import Architecture
from nbl_export.model.architectures import ARCHITECTURES as RECORDS

__all__ = [
    "ARCHITECTURES", "END_IDS", "EPSILON", "EVERY", "HEADS", "HEAD_DIM", "HIDDEN", "INNER", "KINDS", "KV_HEADS",
    "LAYERS", "SPLIT", "VARIANTS", "VOCAB", "cases", "greedy", "made_by", "mlp_module", "random_map", "record_of",
    "save_checkpoint", "save_gguf", "stdlib_text",
]  # fmt: skip

# Every size differs from every other, and the root of the hidden size is no short number: what takes one size for
# another, or rounds, is then wrong. All are multiples of 32, the smallest block of codes.
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
HIDDEN, INNER, LAYERS, VOCAB = 96, 128, 3, 384
EPSILON = 1e-2  # of norms; no library's default, and large enough to be seen
END_IDS = (1, 260)  # of end of text
# Three layers, grouped heads; Mistral with a window shorter than the sequences compared.
ARCHITECTURES = ("llama", "mistral", "mistral-window")
# All that the tool takes, each once, and variants of which an exporter could lose something.
EVERY = (
    "llama", "mistral-window", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "smollm3", "granite",
    "granitemoehybrid", "olmo", "olmo3", "ministral", "ministral3", "nemotron", "ernie4_5", "hunyuan", "glm", "glm4",
    "exaone4", "seed_oss", "apertus", "stablelm", "starcoder2", "gemma", "arcee", "helium", "cwm", "qwen3_moe",
    "qwen2_moe", "olmoe", "granitemoe", "gpt_oss", "phimoe", "mixtral",
)  # fmt: skip
VARIANTS = ("mistral", "llama3", "llama-linear", "llama-yarn", "llama-bias", "qwen2-window", "phi3-window", "phi4-mini",
            "phi3-long")  # fmt: skip


# Of the architectures above, one of each kind; tests of the others are marked (`cases`).
KINDS = ("llama", "mistral-window", "qwen2", "phi3", "gemma3", "olmo2", "smollm3", "granite", "nemotron", "olmoe",
         "gpt_oss")  # fmt: skip


def cases(given: Iterable[Any]) -> list[Any]:
    """Parameters of a test: names, or tuples that begin with one. Those that are no `KINDS` are marked fuzz."""
    import pytest

    def case(item: Any) -> Any:
        values = item if isinstance(item, tuple) else (item,)
        more = values[0] in EVERY and values[0] not in KINDS
        return pytest.param(*values, marks=pytest.mark.fuzz if more else ())

    return [case(item) for item in given]


_RECORD = {
    "mistral-window": "mistral",
    "gemma3": "gemma3_text",
    "hunyuan": "hunyuan_v1_dense",
}  # where it is not the name


def record_of(name: str) -> Architecture:
    """The record of one of `EVERY`."""
    return RECORDS[_RECORD.get(name, name)]


def mlp_module(layer: Any) -> Any:
    """The MLP, or the experts, of a layer of a torch model."""
    names = ("mlp", "block_sparse_moe", "shared_mlp")
    return next(child for name, child in layer.named_children() if name in names)


def made_by(source: str) -> tuple[str, ...]:
    """Those of `EVERY` that a source of decoder graphs makes, as their records say."""
    return tuple(name for name in EVERY if source not in record_of(name).not_from)


def stdlib_text(characters: int) -> str:
    """Prose that is on every machine."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    return path.read_text(encoding="utf-8")[:characters]


@functools.cache
def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([stdlib_text(200_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# What each one adds to the shape that all share (`_config`): its configuration class and its own settings. Windows are
# shorter than the sequences compared; multipliers, scales and caps are such that a graph without them is far off.
# `SPLIT` is for architectures that have no head size of their own.
_WINDOW = 16
_LOUD = {"initializer_range": 0.06}  # logits large enough that a rounded root of the hidden size is seen
SPLIT = {"num_attention_heads": HIDDEN // HEAD_DIM, "head_dim": None}


_EXPERTS = {"num_experts_per_tok": 2}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4, "attention_multiplier": 0.4,
            "tie_word_embeddings": True}  # fmt: skip
_ROPE = {"factor": 4.0, "original_max_position_embeddings": 64}
_SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope_scaling": {"rope_type": "yarn", **_ROPE}}),
    "llama3": (
        "Llama",
        {"rope_scaling": {"rope_type": "llama3", **_ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-window": ("Mistral", {"tie_word_embeddings": False, "sliding_window": _WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, **SPLIT}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1,
                               **SPLIT}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512, **SPLIT}),
    "phi3-window": ("Phi3", {"original_max_position_embeddings": 512, "sliding_window": _WINDOW, **SPLIT}),
    "phi4-mini": ("Phi3", {"original_max_position_embeddings": 512, "partial_rotary_factor": 0.5,
                           "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None,
                           "tie_word_embeddings": True}),
    "phi3-long": ("Phi3", {**SPLIT, "original_max_position_embeddings": 128, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0 + k / 8 for k in range(8)],
        "long_factor": [2.0 + k for k in range(8)]}}),
    "gemma2": ("Gemma2", {**_LOUD, "query_pre_attn_scalar": 24, "sliding_window": _WINDOW,
                          "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3Text", {**_LOUD, "query_pre_attn_scalar": 24, "sliding_window": _WINDOW,
                              "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                              "rope_parameters": {
                                  "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                                  "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
    "olmo2": ("Olmo2", {**SPLIT}),
    "smollm3": ("SmolLM3", {**SPLIT, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": ("Granite", {**SPLIT, **_GRANITE}),
    "granitemoehybrid": ("GraniteMoeHybrid", {**SPLIT, **_GRANITE, "num_local_experts": 0, "mamba_n_heads": 4,
                                              "layer_types": ["attention"] * LAYERS, "shared_intermediate_size": 160,
                                              "position_embedding_type": "rope"}),
    "olmo": ("Olmo", {**SPLIT}),
    "olmo3": ("Olmo3", {**SPLIT, "sliding_window": _WINDOW,
                        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                        "rope_parameters": {
                            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                            "full_attention": {"rope_type": "yarn", "rope_theta": 10_000.0, **_ROPE}}}),
    "ministral": ("Ministral", {"sliding_window": _WINDOW,
                                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "ministral3": ("Ministral3", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, **_ROPE}}),
    "nemotron": ("Nemotron", {"norm_eps": EPSILON, "head_dim": 32, "partial_rotary_factor": 0.5}),
    "ernie4_5": ("Ernie4_5", {"tie_word_embeddings": True}),
    "hunyuan": ("HunYuanDenseV1", {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10_000.0, "alpha": 50.0, "factor": 1.0}}),
    "glm": ("Glm", {"head_dim": 32}),
    "glm4": ("Glm4", {"head_dim": 32}),
    "exaone4": ("Exaone4", {**SPLIT, "sliding_window": _WINDOW,
                            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "seed_oss": ("SeedOss", {}),
    "apertus": ("Apertus", {**SPLIT}),
    "stablelm": ("StableLm", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None,
                              "layer_norm_eps": EPSILON, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", {**SPLIT, "norm_epsilon": EPSILON, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {**_LOUD}),
    "arcee": ("Arcee", {}),
    "helium": ("Helium", {"num_attention_heads": HIDDEN // HEAD_DIM}),
    "cwm": ("Cwm", {"sliding_window": _WINDOW,
                    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0, **_ROPE,
                                        "low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "norm_topk_prob": True}),
    "qwen2_moe": ("Qwen2Moe", {**SPLIT, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64,
                               "shared_expert_intermediate_size": 160}),
    "olmoe": ("Olmoe", {**SPLIT, **_EXPERTS, "num_experts": 4}),
    "granitemoe": ("GraniteMoe", {**SPLIT, **_EXPERTS, **_GRANITE, "num_local_experts": 4}),
    # 8 of 16 experts: another choice, by rounding of activations, then costs little
    "gpt_oss": ("GptOss", {"num_experts_per_tok": 8, "num_local_experts": 16, "sliding_window": _WINDOW,
                           "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "factor": 8.0, "original_max_position_embeddings": 256}}),
    "phimoe": ("Phimoe", {**SPLIT, **_EXPERTS, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
}  # fmt: skip


def _config(architecture: str, changes: dict[str, Any]) -> Any:
    import transformers

    shape = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "rms_norm_eps": EPSILON, "bos_token_id": 0, "eos_token_id": list(END_IDS), "pad_token_id": 1,
    }  # fmt: skip
    kind, special = _SPECIAL[architecture]
    chosen = {key: value for key, value in {**shape, **special, **changes}.items() if key != "head_dim" or value}
    return getattr(transformers, f"{kind}Config")(**chosen)


def save_checkpoint(architecture: str, directory: Path, **changes: Any) -> Path:
    """Write a tiny random checkpoint; equal bytes for equal versions of torch and transformers.

    Args:
        changes: go into its configuration.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture, changes))
    with torch.no_grad():  # larger than the usual initialisation, so that attention matters
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            else:  # norms and biases: what starts as 1 or 0 could be forgotten unseen
                parameter.add_(0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name in model.state_dict():  # such as numbers of an activation
                buffer.normal_(0, 0.3)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def narrowed(checkpoint: Path, out: Path, dtype: str, but: str = "") -> Path:
    """A copy of a checkpoint with weights of 16 bits, apart from those whose names end with `but`."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    for file in out.glob("*.safetensors"):
        wide = load_file(file)
        kept = {name for name in wide if but and name.endswith(but)}
        made = {name: value if name in kept else value.to(getattr(torch, dtype)) for name, value in wide.items()}
        save_file(made, file, {"format": "pt"})
    settings = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps({**settings, "dtype": dtype}), encoding="utf-8")
    return out


def random_map(layer: int) -> Linear:
    """A random affine map; the same layer always gets the same."""
    rng = np.random.default_rng(layer)
    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / 8).astype(np.float32)
    return Linear(weight, rng.standard_normal(HIDDEN).astype(np.float32))


def greedy(model: Any, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Greedy continuation of a prompt by a torch model, without a cache; ignores the end of text."""
    import torch

    row = list(ids)
    with torch.no_grad():
        for _ in range(new_tokens):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(ids) :]


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def save_gguf(path: Path, checkpoint: Path | None = None) -> Path:
    """Write the tiny Llama of a checkpoint as an unquantised GGUF; without one, a random Llama."""
    import gguf
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as scratch:
        directory = checkpoint or save_checkpoint("llama", Path(scratch) / "llama")
        tensors = load_file(directory / "model.safetensors")
        model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB)
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))  # the first two are control tokens
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(*_as_gguf(name.removesuffix(".weight"), tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_gguf(name: str, tensor: np.ndarray) -> tuple[str, np.ndarray]:
    """llama.cpp's name; rows of query and key heads in its order: pairs that rotate together side by side."""
    if not name.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd.weight", "model.norm": "output_norm.weight"}[name], tensor
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    if part.endswith(("q_proj", "k_proj")):
        tensor = tensor.reshape(-1, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(tensor.shape)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight", tensor
