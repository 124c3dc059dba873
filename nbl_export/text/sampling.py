"""Samples calibration tokens from the model itself, from its first token on, at temperature 1.

Sequences are sampled in batches with the cache, cut after an end-of-text token, and packed like documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nbl_export.errors import NblError

__all__ = ["sample_windows"]

_SEQUENCES = 32  # sampled at once


def sample_windows(
    model: Any, windows: int, context: int, seed: int, progress: Callable[[int, int], None]
) -> torch.Tensor:
    """Token ids [windows, context]; equal ids for equal seeds on one kind of device.

    Raises:
        NblError: the model's configuration names no token to begin with.
    """
    from transformers import GenerationConfig

    config = model.config
    start = config.bos_token_id if config.bos_token_id is not None else _first(config.eos_token_id)
    if start is None:
        raise NblError(
            "--calibration self: the model names no token to begin with (bos_token_id); give --calibration text"
        )
    ends = [] if config.eos_token_id is None else torch.atleast_1d(torch.tensor(config.eos_token_id)).tolist()
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=context - 1, use_cache=True,
        bos_token_id=start, eos_token_id=ends or None, pad_token_id=ends[0] if ends else start,
    )  # fmt: skip
    ids: list[int] = []
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        while len(ids) < windows * context:
            begun = torch.full((_SEQUENCES, 1), start, dtype=torch.long, device=model.device)
            said = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=settings)
            for row in said.tolist():
                ids += _until_end(row, ends)
            progress(min(len(ids), windows * context), windows * context)
    return torch.tensor(ids[: windows * context], dtype=torch.long).view(windows, context)


def _first(value: Any) -> int | None:
    return value[0] if isinstance(value, list) and value else value


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    """A sequence up to and including its first end token; the first token does not count as an end token."""
    for place, token in enumerate(row[1:], 1):
        if token in ends:
            return row[: place + 1]
    return row
