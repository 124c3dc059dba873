"""Tiny random decoders with a trained byte-pair tokenizer: for tests and for graphs/render.py. No network."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.records import AffineMap

__all__ = ["ARCHITECTURES", "HEAD_DIM", "HIDDEN", "LAYERS", "VOCAB", "random_map", "save_checkpoint", "stdlib_text"]

HEAD_DIM = 16
HIDDEN, LAYERS, VOCAB = 64, 3, 384
# Three layers, grouped heads; Mistral with a window shorter than the sequences compared.
ARCHITECTURES = ("llama", "mistral", "mistral-window")


def stdlib_text(characters: int) -> str:
    """Prose that is on every machine."""
    path = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    return path.read_text(encoding="utf-8")[:characters]


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


def _config(architecture: str) -> Any:
    import transformers

    shape = {
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 512, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    if architecture == "llama":
        return transformers.LlamaConfig(**shape, tie_word_embeddings=True)
    window = 16 if architecture == "mistral-window" else None
    return transformers.MistralConfig(**shape, sliding_window=window, tie_word_embeddings=False)


def save_checkpoint(architecture: str, directory: Path) -> Path:
    """Write a tiny random checkpoint; equal bytes for equal versions of torch and transformers."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture))
    with torch.no_grad():  # larger than the usual initialisation, so that attention matters
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def random_map(layer: int) -> AffineMap:
    """A random affine map; the same layer always gets the same."""
    rng = np.random.default_rng(layer)
    weight = (rng.standard_normal((HIDDEN, HIDDEN)) / 8).astype(np.float32)
    return AffineMap(weight, rng.standard_normal(HIDDEN).astype(np.float32))
