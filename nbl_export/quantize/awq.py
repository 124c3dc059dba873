"""Activation-aware scales: one exponent a group, chosen by the error of the rounded matrices' outputs.

    s = m^a, m the mean magnitude of each channel of x;   a of 0, 0.1, ... 1 with the least
    sum over readers W and rows x of | (Q(W s) / s - W) x |^2,   Q rounds to 4-bit blocks

Channels with large activations are stretched before the rounding, so their weights get finer steps (Lin et al., AWQ,
2023, section 3.2). a = 0 is plain rounding, so no group gets worse on its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from nbl_export.model.rescale import Group
from nbl_export.quantize.activations import Seen

__all__ = ["Choice", "choose", "rounded"]

_EXPONENTS = tuple(k / 10 for k in range(11))
_LEAST = 1e-4  # of a channel's mean magnitude, relative to the mean of all


@dataclass(frozen=True)
class Choice:
    """A group's exponent, its scale [C], and the error of rounding: relative to that of plain rounding."""

    exponent: float
    scale_C: torch.Tensor
    error: float


def choose(
    groups: Iterable[Group], seen: Mapping[str, Seen], block: int, progress: Callable[[int, int], None]
) -> dict[str, Choice]:
    """The best exponent of each group.

    Args:
        block: elements that share a scale in the quantised graph.
    """
    found, all_groups = {}, list(groups)
    with torch.inference_mode():
        for done, group in enumerate(all_groups, 1):
            found[group.name] = _best(group, seen[group.name], block)
            progress(done, len(all_groups))
    return found


def _best(group: Group, seen: Seen, block: int) -> Choice:
    mean_C = group.gathered(seen.mean_K)
    mean_C = mean_C.clamp(min=float(mean_C.mean()) * _LEAST + 1e-30)
    rows_RK = seen.sample_RK
    scales = [(mean_C / mean_C.log().mean().exp()) ** exponent for exponent in _EXPONENTS]
    errors = [_error(group, group.spread(scale), rows_RK, block) for scale in scales]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Choice(_EXPONENTS[best], scales[best], errors[best] / max(errors[0], 1e-30))


def _error(group: Group, scale_K: torch.Tensor, rows_RK: torch.Tensor, block: int) -> float:
    total = 0.0
    for reader in group.readers:
        weight = reader.weight.float()
        off = rounded(weight * scale_K, block) / scale_K - weight
        total += float((rows_RK @ off.T).square().sum())
    return total


def rounded(weight_NK: torch.Tensor, block: int) -> torch.Tensor:
    """The matrix in symmetric 4-bit blocks along K, as the GenAI builder rounds.

    The element of largest magnitude in a block becomes the code -8. Columns beyond the last whole block form a block.
    """
    rows, columns = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK, (0, -columns % block)).view(rows, -1, block)
    peak = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    step = torch.where(peak == 0, torch.ones_like(peak), peak / -8)
    codes = (padded / step).round().clamp(-8, 7)
    return (codes * step).view(rows, -1)[:, :columns]
