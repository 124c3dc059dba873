"""Check exporter: the exporter's original graph against the torch model of the checkpoint.

    fp32, fp16, bf16    logits of the probe's rows, of one pass over each
    int8, int4          perplexity on held-back windows, since rounded matrices give other logits

The bounds are of damage, not of quality. Rounding every matrix of SmolLM2-135M to int4 raises perplexity by 34% to 36%,
with `k_quant` by up to 39%, and of Qwen2.5-Coder-0.5B by 15% at most. Codes of 8 bits raise it by at most 0.5%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import apart
from nbl_export.verify.ladder import PERPLEXITY, TOLERANCES, Probe, Reference, shown_positions
from nbl_export.verify.perplexity import quality_loss

__all__ = ["ROUNDED", "check_logits", "check_perplexity", "row_logits"]

ROUNDED = {"int8": (0.05, 0.25), "int4": (0.1, 1.0)}  # precision -> increase of a warning, and of a failure
_WINDOWS = 4


def row_logits(model: Any, row: Sequence[int], positions: np.ndarray | None = None) -> np.ndarray:
    """Logits [positions, V] of one pass of the torch model over a row, without a cache; all positions by default."""
    kept = 0 if positions is None else torch.from_numpy(positions)
    with torch.inference_mode():
        out = model(torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=kept)
    found: np.ndarray = out.logits[0].float().cpu().numpy()
    return found


def check_logits(model: Any, precision: str, probe: Probe, original: Reference) -> list[CheckResult]:
    """Compare the original's logits with those of the torch model."""
    limit = TOLERANCES[precision].limit
    metric = "relative rms logit difference from torch"
    rows = [_figure(model, row, logits) for row, logits in zip(probe.rows, original.logits, strict=True)]
    figures = [("one pass over each row", float(np.max(rows)))]  # NaN if one is
    if original.long is not None:
        figure = _figure(model, probe.long, original.long, shown_positions(len(probe.long)))
        figures.append((f"one sequence of {len(probe.long)} tokens", figure))
    return [
        CheckResult("exporter", "original", metric, value, limit, bool(np.isfinite(value) and value <= limit), name)
        for name, value in figures
    ]


def _figure(model: Any, row: Sequence[int], logits: np.ndarray, positions: np.ndarray | None = None) -> float:
    return apart(row_logits(model, row, positions), logits)


def check_perplexity(
    model: Any, original: Any, precision: str, windows: np.ndarray, progress: Callable[[int, int], None]
) -> tuple[CheckResult, str]:
    """Compare the original's perplexity with that of the torch model; also a warning, or "".

    Args:
        original: a decoder of the graph in the arithmetic that ships.
        windows: held-back token ids [windows, context], of which the first are read.
    """
    warned, limit = ROUNDED[precision]
    (row,), _ = quality_loss(_Torch(model), original, [("", windows[:_WINDOWS])], progress, answers=False)
    value = math.inf if row["increase"] is None else row["increase"]
    before, after = (
        "not finite" if row[name] is None else f"{row[name]:.2f}" for name in ("perplexity_original", "perplexity_nbl")
    )
    detail = f"{after} against {before} on {row['tokens']:,} held-back tokens"
    passed = value <= limit
    warning = f"{precision} alone raises the original's perplexity by {value:.0%} ({detail})"
    result = CheckResult("exporter", "original", PERPLEXITY, value, limit, passed, detail)
    return result, warning if warned < value < math.inf else ""


class _Torch:
    """The torch model as a decoder of whole windows."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def begin(self, batch: int) -> None:
        pass

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        return np.stack([row_logits(self._model, row) for row in ids_BT])
