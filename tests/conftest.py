"""Tiny random decoders, exported for real, once a session.

`checkpoint("llama")` is a directory with safetensors and a small byte-pair tokenizer; `exported("llama", "genai")` a
deployable directory; `text` a calibration text. Nothing here needs a network.
"""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import functools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.records import AffineMap

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


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture -> directory of a tiny random checkpoint."""

    @functools.cache
    def make(architecture: str) -> Path:
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(7)
        directory = tmp_path_factory.mktemp(architecture)
        model = transformers.AutoModelForCausalLM.from_config(_config(architecture))
        with torch.no_grad():  # larger than the usual initialisation, so that attention matters
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(4)
        model.save_pretrained(directory)
        _tokenizer().save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(architecture, source, precision) -> deployable directory of the original decoder."""

    @functools.cache
    def make(architecture: str, source: str = "genai", precision: str = "fp32") -> Path:
        from nbl_export.decoders import build_decoder

        out = tmp_path_factory.mktemp(f"{architecture}-{source}-{precision}") / "original"
        build_decoder(source, checkpoint(architecture), out, precision)
        return out

    return make


@pytest.fixture(scope="session")
def genai_dirs(exported: Callable[..., Path], random_maps: Callable[..., dict[int, AffineMap]]) -> dict[str, Path]:
    """A tiny GenAI model and its NBL version with the middle layer replaced (sparse cache ids)."""
    from nbl_export.records import Plan
    from nbl_export.rewrite import rewrite

    original = exported("llama")
    nbl = original.parent / "nbl"
    if not nbl.exists():
        rewrite(original, nbl, Plan(LAYERS, (1,)), random_maps(1))
    return {"original": original, "nbl": nbl}


@pytest.fixture(scope="session")
def random_maps() -> Callable[..., dict[int, AffineMap]]:
    """layers -> a random affine map each; the same layer always gets the same map."""

    def make(*layers: int) -> dict[int, AffineMap]:
        maps = {}
        for layer in layers:
            rng = np.random.default_rng(layer)
            weight = (rng.standard_normal((HIDDEN, HIDDEN)) / 8).astype(np.float32)
            maps[layer] = AffineMap(weight, rng.standard_normal(HIDDEN).astype(np.float32))
        return maps

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of about 20,000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(stdlib_text(60_000), encoding="utf-8")
    return path
