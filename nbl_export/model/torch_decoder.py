"""A torch model as a decoder: greedy tokens, and the probabilities of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["TorchDecoder"]


class TorchDecoder:
    """A causal LM of transformers as a decoder that continues and scores token ids."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation of a prompt; ignores the end of text."""
        row = list(ids)  # whole each time: prompts are short, and nothing depends on a cache
        for _ in range(new_tokens):
            row.append(int(self._model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        return row[len(ids) :]

    @torch.no_grad()
    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Natural logarithms [T - 1] of the probabilities of ids[1:], and the likeliest ids [T - 1] in their places."""
        row = torch.tensor([list(ids)])
        logits = self._model(row, use_cache=False).logits[0, :-1].float()
        logs = logits.log_softmax(-1)[torch.arange(len(ids) - 1), row[0, 1:]]
        return np.asarray(logs.double().numpy()), np.asarray(logits.argmax(-1).numpy())
