"""Tiny random decoders whose attention TensorRT has kernels for (4 query heads of 64), and what torch says of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.methods.linear.maps import Linear
from nbl_export.records.decoder import DecoderSpec

__all__ = ["ARCHITECTURES", "HEAD", "LAYERS", "SLOTS", "SPEC", "SUBSETS", "TOLERANCE", "VOCAB", "WINDOW", "appended",
           "maps_of", "open_decoder", "parts_of", "rows", "save_checkpoint", "single_row_error", "torch_logits",
           "worst"]  # fmt: skip

HEAD, HIDDEN, LAYERS, VOCAB, WINDOW = 64, 128, 3, 384, 16
SLOTS = 96
SUBSETS = [s for n in range(1, LAYERS) for s in itertools.combinations(range(LAYERS), n)]
ARCHITECTURES = ("llama", "mistral", "mistral-window")  # tied with biases, untied, untied with a window
SPEC = DecoderSpec("llama", LAYERS, HIDDEN, 4, 2, HEAD, VOCAB, 32_768)
# Largest logit difference from torch, logits reach 4: two float32 engines differ by 3e-6, float16 by 5e-3.
TOLERANCE = {"fp32": 5e-5, "fp16": 0.03}


def _config(architecture: str, **changes: Any) -> Any:
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": HEAD, "vocab_size": VOCAB, "max_position_embeddings": 32_768,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **changes,
    }  # fmt: skip
    if architecture == "llama":
        return transformers.LlamaConfig(**shape, tie_word_embeddings=True, attention_bias=True)
    window = WINDOW if architecture == "mistral-window" else None
    return transformers.MistralConfig(**shape, sliding_window=window, tie_word_embeddings=False)


def save_checkpoint(architecture: str, directory: Path, **changes: Any) -> Path:
    """Write a random checkpoint without a tokenizer; `changes` go into its configuration."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(_config(architecture, **changes))
    with torch.no_grad():  # larger than the usual initialisation, so that attention matters
        for parameter in model.parameters():
            parameter.normal_(0, 0.08) if parameter.ndim == 2 else parameter.normal_(1, 0.1)
    model.save_pretrained(directory)
    return directory


def rows(lengths: Sequence[int] = (SLOTS, SLOTS)) -> list[list[int]]:
    """Random token ids."""
    rng = np.random.default_rng(5)
    return [rng.integers(2, VOCAB, SLOTS).tolist()[:n] for n in lengths]


def maps_of(layers: Sequence[int]) -> dict[int, Linear]:
    """A random affine map for each layer, of a size that leaves the others' attention visible."""
    found = {}
    for layer in layers:
        rng = np.random.default_rng(100 + layer)
        weight = (0.5 * rng.standard_normal((HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32)
        found[layer] = Linear(weight, (0.1 * rng.standard_normal(HIDDEN)).astype(np.float32))
    return found


def torch_logits(checkpoint: Path, maps: Mapping[int, Linear] | None = None) -> list[np.ndarray]:
    """What torch says of `rows()`: [SLOTS, VOCAB] each, every row by itself."""
    import torch

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint.load import load_model

    model = linearize(load_model(checkpoint), maps or {})
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


def worst(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference; infinite where anything is not finite."""
    difference = np.abs(got.astype(np.float64) - expected)
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def open_decoder(path: Path, chunk: int | None = None) -> OnnxDecoder:
    """A graph in float32, or with int4 blocks, as verification opens it."""
    return OnnxDecoder(path.parent, HEAD, file=path.name, fp32_activations=True, chunk=chunk)


def appended(decoder: OnnxDecoder, parts: Iterable[list[int]]) -> Iterator[np.ndarray]:
    """Logits after each part of a single row."""
    decoder.begin(1)
    for part in parts:
        yield decoder.step(np.array([part]))[0]


def parts_of(row: list[int], lengths: list[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(lengths))
    return [row[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def single_row_error(path: Path, expected: np.ndarray, lengths: list[int], chunk: int) -> float:
    """Largest difference over all logits that parts of these lengths give, in chunks."""
    found, end = 0.0, 0
    for part, got in zip(lengths, appended(open_decoder(path, chunk), parts_of(rows()[0], lengths)), strict=True):
        end += part
        found = max(found, worst(got, expected[end - len(got) : end]))
    return found
