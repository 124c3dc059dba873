"""Sizes of a decoder from its GGUF file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nbl_export.errors import CorruptError
from nbl_export.gguf_format.content import Content, read_content

__all__ = ["GgufFacts", "facts_of", "read_gguf_facts"]

_CACHE_BYTES = 2  # llama.cpp keeps keys and values in float16 by default


@dataclass(frozen=True)
class GgufFacts:
    """What a comparison needs to know of a file."""

    vocab_size: int
    context_length: int
    cache_bytes_per_token: int
    cache_layers: int
    parameters: int
    head_dim: int


def read_gguf_facts(path: Path) -> GgufFacts:
    """Sizes of a file.

    Raises:
        CorruptError: the file cannot be read, or lacks a size.
    """
    try:
        return facts_of(read_content(path))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptError(f"{path} does not state its sizes ({error}); convert it again") from error


def facts_of(content: Content) -> GgufFacts:
    """Sizes of a content. Layers without key/value heads have no cache."""
    layers = content.num_layers
    heads = _each(content.get("attention.head_count"), layers)
    pairs = _each(content.get("attention.head_count_kv", content.get("attention.head_count")), layers)
    head = int(content.get("attention.key_length") or content.get("embedding_length") // max(heads))
    return GgufFacts(
        vocab_size=content.by_name["token_embd.weight"].shape[0],
        context_length=int(content.get("context_length")),
        cache_bytes_per_token=2 * sum(pairs) * head * _CACHE_BYTES,
        cache_layers=sum(1 for n in pairs if n),
        parameters=sum(math.prod(t.shape) for t in content.tensors),
        head_dim=head,
    )


def _each(value: int | list[int], layers: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list) else [int(value)] * layers
