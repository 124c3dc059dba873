"""The probabilities that a torch model gives to the tokens of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["log_probabilities"]


@torch.no_grad()
def log_probabilities(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Natural logarithms [T - 1] of the probabilities of ids[1:], each given the ids before it."""
    row_1T = torch.tensor([list(ids)])
    logits_TV = model(row_1T, use_cache=False).logits[0, :-1].float()
    logs_TV = logits_TV.log_softmax(-1)
    return np.asarray(logs_TV[torch.arange(len(ids) - 1), row_1T[0, 1:]].double().numpy())
