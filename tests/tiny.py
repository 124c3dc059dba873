"""Tiny random decoders with a trained byte-pair tokenizer: for tests and for graphs/render.py. No network."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.model.architectures import ARCHITECTURES as RECORDS
from nbl_export.records.plan import AffineMap

__all__ = [
    "ARCHITECTURES",
    "EVERY",
    "HEAD_DIM",
    "HIDDEN",
    "LAYERS",
    "VARIANTS",
    "VOCAB",
    "made_by",
    "random_map",
    "save_checkpoint",
    "save_gguf",
    "stdlib_text",
]

HEAD_DIM = 16
HIDDEN, LAYERS, VOCAB = 64, 3, 384
# Three layers, grouped heads; Mistral with a window shorter than the sequences compared.
ARCHITECTURES = ("llama", "mistral", "mistral-window")
# All that the tool takes, each once, and variants of which an exporter could lose something.
EVERY = ("llama", "mistral-window", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "smollm3", "granite")
VARIANTS = ("mistral", "llama3", "llama-linear", "llama-yarn", "qwen2-window", "phi3-window", "phi4-mini", "phi3-long")


_RECORD = {"mistral-window": "mistral", "gemma3": "gemma3_text"}  # where it is not the name


def made_by(source: str) -> tuple[str, ...]:
    """Those of `EVERY` that a source of decoder graphs makes, as their records say."""
    return tuple(name for name in EVERY if source not in RECORDS[_RECORD.get(name, name)].not_from)


def stdlib_text(characters: int) -> str:
    """Prose that is on every machine."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    return path.read_text(encoding="utf-8")[:characters]


@functools.cache
def _tokenizer() -> Any:
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
_WINDOW = 16
_ROPE = {"factor": 4.0, "original_max_position_embeddings": 64}
_SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-yarn": ("Llama", {"rope_scaling": {"rope_type": "yarn", **_ROPE}}),
    "llama3": (
        "Llama",
        {"rope_scaling": {"rope_type": "llama3", **_ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "mistral": ("Mistral", {"tie_word_embeddings": False, "sliding_window": None}),
    "mistral-window": ("Mistral", {"tie_word_embeddings": False, "sliding_window": _WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": HEAD_DIM, "tie_word_embeddings": True}),
    "phi3": ("Phi3", {"original_max_position_embeddings": 512}),
    "phi3-window": ("Phi3", {"original_max_position_embeddings": 512, "sliding_window": _WINDOW}),
    "phi4-mini": ("Phi3", {"original_max_position_embeddings": 512, "partial_rotary_factor": 0.5,
                           "num_attention_heads": 2, "num_key_value_heads": 1,
                           "tie_word_embeddings": True}),
    "phi3-long": ("Phi3", {"original_max_position_embeddings": 128, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0 + k / 8 for k in range(8)],
        "long_factor": [2.0 + k for k in range(8)]}}),
    "gemma2": ("Gemma2", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": 24, "sliding_window": _WINDOW,
                          "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3Text", {"head_dim": HEAD_DIM, "query_pre_attn_scalar": 24, "sliding_window": _WINDOW,
                              "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.4,
                            "attention_multiplier": 0.4, "tie_word_embeddings": True}),
}  # fmt: skip


def _config(architecture: str, changes: dict[str, Any]) -> Any:
    import transformers

    shape = {
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    kind, special = _SPECIAL[architecture]
    return getattr(transformers, f"{kind}Config")(**{**shape, **special, **changes})


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
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif architecture not in ARCHITECTURES:  # norms and biases: what starts as 1 or 0 could be forgotten unseen
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def random_map(layer: int) -> AffineMap:
    """A random affine map; the same layer always gets the same."""
    rng = np.random.default_rng(layer)
    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / 8).astype(np.float32)
    return AffineMap(weight, rng.standard_normal(HIDDEN).astype(np.float32))


def save_gguf(path: Path) -> Path:
    """Write a tiny random Llama of the usual shape as GGUF, with its tokenizer."""
    import json

    import gguf

    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    said = json.loads(_tokenizer().backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(said["model"]["vocab"], key=said["model"]["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in said["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"attn_q": (64, HIDDEN), "attn_k": (32, HIDDEN), "attn_v": (32, HIDDEN), "attn_output": (HIDDEN, 64),
              "ffn_gate": (96, HIDDEN), "ffn_up": (96, HIDDEN), "ffn_down": (HIDDEN, 96),
              "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}  # fmt: skip
    named = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in shapes.items()}
    for name, shape in {"token_embd.weight": (VOCAB, HIDDEN), **named, "output_norm.weight": (HIDDEN,)}.items():
        values = rng.standard_normal(shape) / 8 if len(shape) == 2 else np.ones(shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
