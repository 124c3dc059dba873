"""A torch model as a model of lm-evaluation-harness: the harness' own class, on a model that is already there."""

from __future__ import annotations

from typing import Any

__all__ = ["torch_lm"]

_ROWS = 4  # the harness makes log-probabilities of every position of a batch


def torch_lm(model: Any, tokenizer: Any, max_length: int) -> Any:
    """`lm_eval.models.huggingface.HFLM` over `model`, on the device it is on."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=_ROWS,
        max_length=max_length,
        device=str(model.device),
    )
