"""Logits of a model from its last hidden states, and small changes of logits.

logits = cap * tanh(W h / divisor / cap)          most architectures have neither divisor nor cap
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from nbl_export.model import bfloat16
from nbl_export.model.architectures import architecture_of

__all__ = ["Head", "all_logits", "divergence", "log_probabilities", "logits_of"]


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [..., V] in float32 from last hidden states [..., D], as the model's own forward computes them."""
    record = architecture_of(model.config)
    config = model.config
    logits: torch.Tensor = model.lm_head(hidden)
    if record.logits_divisor is not None:
        logits = logits / getattr(config, record.logits_divisor)
    cap = None if record.logits_cap is None else getattr(config, record.logits_cap)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits.float()


@torch.inference_mode()
def all_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Logits [T, V] in float32 behind each of the ids, by a whole forward."""
    return np.asarray(model(torch.tensor([list(ids)]), use_cache=False).logits[0].float().numpy())


@torch.inference_mode()
def log_probabilities(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Natural logarithms [T - 1] of the probabilities of ids[1:], each given the ids before it, by a whole forward."""
    logs_TV = torch.from_numpy(all_logits(model, ids)[:-1]).log_softmax(-1)
    return np.asarray(logs_TV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().numpy())


class Head:
    """The head of a model as a function of changes of the hidden states.

    Args:
        model: a causal LM of transformers.
        bf16_matmul: products of changes in bfloat16, with a copy of the matrix. Logits themselves stay float32.
    """

    def __init__(self, model: Any, *, bf16_matmul: bool = False) -> None:
        record = architecture_of(model.config)
        config = model.config
        weight_VD = model.lm_head.weight.detach()
        self._model = model
        self.size = weight_VD.shape[0]
        self._weight_VD = weight_VD.to(torch.bfloat16) if bf16_matmul else weight_VD
        self._divisor = None if record.logits_divisor is None else float(getattr(config, record.logits_divisor))
        self._cap = None if record.logits_cap is None else getattr(config, record.logits_cap)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in float32, from float32 products."""
        with bfloat16.bf16_autocast(hidden_ND.device, False):
            return logits_of(self._model, hidden_ND)

    def near_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] as exact as their products: two or three digits in bfloat16."""
        if self._weight_VD.dtype == torch.float32:
            return self.logits(hidden_ND)
        found = self.changes(hidden_ND.new_zeros(1, self.size), hidden_ND[:, None])[:, 0].float()
        bias = self._model.lm_head.bias  # of an architecture that has neither divisor nor cap
        return found if bias is None else found + bias

    def changes(self, logits_NV: torch.Tensor, change_NKD: torch.Tensor) -> torch.Tensor:
        """Changes of the logits [N, K, V], in the type of the products, if the hidden states change."""
        found: torch.Tensor = change_NKD.to(self._weight_VD.dtype) @ self._weight_VD.T
        if self._divisor is not None:
            found = found / self._divisor
        if self._cap is None:
            return found
        before = torch.atanh((logits_NV / self._cap).clamp(-_BELOW_ONE, _BELOW_ONE))[:, None]
        return self._cap * (torch.tanh(found / self._cap + before) - torch.tanh(before))

    def pull(self, logits_NV: torch.Tensor, slope_NKV: torch.Tensor) -> torch.Tensor:
        """Gradient [N, K, D] by the hidden states, from the gradient [N, K, V] by the logits."""
        if self._cap is not None:
            slope_NKV = slope_NKV * (1 - (logits_NV / self._cap).square())[:, None]
        found = (slope_NKV.to(self._weight_VD.dtype) @ self._weight_VD).float()
        return found if self._divisor is None else found / self._divisor


def divergence(
    share_NV: torch.Tensor, apart_NKV: torch.Tensor, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and rise of the cross entropy if logits change, [N, K] each, in nats.

    Computed from the changes a of the logits, since the difference of two large losses has few digits:
    KL = log E_p exp(a) - E_p a, and a target's loss rises by log E_p exp(a) - a_target.

    Args:
        share_NV: probabilities before.
        apart_NKV: changes of the logits for each of K mixes; overwritten.
    """
    mean_NK = (apart_NKV @ share_NV[..., None])[..., 0]
    hit_NK = apart_NKV.gather(2, target_N[:, None, None].expand(-1, apart_NKV.shape[1], 1))[..., 0]
    shift_NK = torch.zeros_like(mean_NK)
    most = apart_NKV.max().item()
    least = mean_NK.min().item()
    if not (most <= _SAFE and least >= -_FEW_DIGITS):  # NaN too
        shift_NK = mean_NK
        apart_NKV -= shift_NK[..., None]
    if most - min(least, 0.0) <= _SAFE:
        raised_NK = (apart_NKV.expm1_() @ share_NV[..., None])[..., 0].log1p()
    else:
        raised_NK = apart_NKV.add_(share_NV.log()[:, None]).logsumexp(2)
    return raised_NK - (mean_NK - shift_NK), raised_NK + (shift_NK - hit_NK)


_BELOW_ONE = 1 - 2.0**-23
_SAFE = 80.0  # exp of a larger float32 is near its range
# If all changes are below -1, E_p exp(a) - 1 is close to -1 and has few digits. Around their mean, it has more.
_FEW_DIGITS = 1.0
