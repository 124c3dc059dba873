"""What the torch model says: logits and greedy text that graphs are held to. Plain numpy comes out."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["Reference", "make_reference"]

_NOISE_DRAWS = 4


@dataclass(frozen=True)
class Reference:
    """Teacher-forced logits of each row, [length, V] float32, and greedy continuations of the prompts.

    `noise` [length] is how far the logits of each position move when the embeddings are perturbed by a few
    float32 roundings: two correct float32 engines can differ by some multiple of it. It is small everywhere in
    an ordinary model, and large at tokens that stand on the edge of a massive activation (a token that has
    half become an attention sink), which linearized early layers make more frequent.

    `margins` are the gaps between best and second-best logit at each greedy step: where a gap is below the
    numerical noise, another engine may rightly choose the other token.
    """

    logits: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]


def make_reference(
    model: Any, rows: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int
) -> Reference:
    """Run the torch model: one full causal forward a row (no cache, no padding), greedy with its cache."""
    with torch.inference_mode():
        logits = tuple(_logits(model, row) for row in rows)
        noise = tuple(_noise(model, row, clean) for row, clean in zip(rows, logits, strict=True))
        continued = [_greedy(model, prompt, new_tokens) for prompt in prompts]
    return Reference(logits, noise, tuple(ids for ids, _ in continued), tuple(gaps for _, gaps in continued))


def _logits(model: Any, row: Sequence[int]) -> np.ndarray:
    found: np.ndarray = model(torch.tensor([list(row)]), use_cache=False).logits[0].float().numpy()
    return found


def _noise(model: Any, row: Sequence[int], clean: np.ndarray) -> np.ndarray:
    """Largest logit change of each position over a few seeded perturbations of relative size 2^-22."""
    embeddings = model.get_input_embeddings()(torch.tensor([list(row)]))
    generator = torch.Generator().manual_seed(0)
    worst = np.zeros(len(row), np.float32)
    for _ in range(_NOISE_DRAWS):
        factor = 1 + 2.0**-22 * torch.randn(embeddings.shape, generator=generator)
        moved = model(inputs_embeds=embeddings * factor, use_cache=False).logits[0].float().numpy()
        worst = np.maximum(worst, np.abs(moved - clean).max(1))
    return worst


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids: list[int] = []
    gaps: list[float] = []
    step, cache = torch.tensor([list(prompt)]), None
    # transformers 5.24 renames the argument and warns of the old name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(new_tokens):
        out = model(input_ids=step, use_cache=True, **{name: cache})
        cache = getattr(out, name)
        top = out.logits[0, -1].float().topk(2)
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        step = torch.tensor([[ids[-1]]])
    return tuple(ids), tuple(gaps)
