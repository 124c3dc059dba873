"""What the torch model says: logits and greedy text that graphs are held to. Plain numpy comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Reference", "make_reference"]


@dataclass(frozen=True)
class Reference:
    """Teacher-forced logits of each row, [length, V] float32, and greedy continuations of the prompts.

    `margins` are the gaps between best and second-best logit at each greedy step: where a gap is below the
    numerical noise, another engine may rightly choose the other token.
    """

    logits: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]


def make_reference(
    model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int
) -> Reference:
    """Run the torch model: one full causal forward a row (no cache, no padding), greedy with its cache."""
    with torch.inference_mode():
        logits = tuple(model(torch.tensor([list(row)]), use_cache=False).logits[0].float().numpy() for row in rows)
        continued = [_greedy(model, prompt, new_tokens) for prompt in prompts]
    return Reference(logits, tuple(ids for ids, _ in continued), tuple(gaps for _, gaps in continued))


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids: list[int] = []
    gaps: list[float] = []
    step, cache = torch.tensor([list(prompt)]), None
    for _ in range(new_tokens):
        out = model(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        top = out.logits[0, -1].float().topk(2)
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        step = torch.tensor([[ids[-1]]])
    return tuple(ids), tuple(gaps)
