"""A torch model as a model of lm-evaluation-harness: the harness' own class over a loaded model."""

from __future__ import annotations

from typing import Any

__all__ = ["torch_lm"]

_ROWS = 4  # small, because the harness computes log-probabilities of every position of a batch


def torch_lm(model: Any, tokenizer: Any, max_length: int) -> Any:
    """`lm_eval.models.huggingface.HFLM` over `model`, on the model's device.

    The class draws no progress bars; it calls its `progress` with (done, total) requests.
    """
    from lm_eval.models.huggingface import HFLM

    class QuietHFLM(HFLM):
        progress: Any = None
        _asked = _read = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
            self._asked, self._read = len(requests), 0
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, **kwargs)
            self._read += len(inps)
            if self.progress is not None and self._read <= self._asked:
                self.progress(self._read, self._asked)
            return logits

    return QuietHFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=_ROWS,
        max_length=max_length,
        device=str(model.device),
    )
