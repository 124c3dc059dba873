"""Moments -> CCA bound, calibration error and matrices of a mixer, all in float64 and in closed form.

X are rows of a layer's input at the tap, Y of its attention output, Y+ = X + Y. With centred second moments
    W = Cyx (Cxx + lambda I)^-1,   b = E[Y] - W E[X]                       (LMMSE estimator)
    W = Ryx (Rxx + lambda I)^-1,   b = 0,   R = E[y x'] not centred        (a map without a bias)
    bound = d - || L+^-1 C+x Lx^-T ||_F^2,  Cxx = Lx Lx', C++ = L+ L+'     (CCA, without an SVD)
Source: Erdogan, Tonin, Cevher, "Efficient Large Language Model Inference with Neural Block
Linearization", NeurIPS 2025; the Cholesky form of the bound is ours.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nbl_export.errors import NblError
from nbl_export.records.plan import LayerScore

__all__ = ["RIDGE", "Fitted", "Moments", "cholesky", "fit", "score"]

log = logging.getLogger(__name__)

# Relative to mean(diag Cxx). Large enough for a rank-deficient Cxx of small models, too small to bias a fit.
RIDGE = 1e-6
_RAISES = 4  # tenfold each: a ridge of 1e-2 costs nothing measurable on whole texts (bench/EXPERIMENTS.md)


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of one layer: raw, uncentred, float64. Only `methods.sums.Sums` can be added."""

    count: int
    x_sum: torch.Tensor  # [D]
    y_sum: torch.Tensor  # [D]
    xx: torch.Tensor  # [D, D] X'X
    yx: torch.Tensor  # [D, D] Y'X
    yy: torch.Tensor  # [D, D] Y'Y

    def about_zero(self) -> Moments:
        """The moments as if all means were zero. A map fitted to these has no bias."""
        return dataclasses.replace(self, x_sum=torch.zeros_like(self.x_sum), y_sum=torch.zeros_like(self.y_sum))

    def centred(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Means of X and Y, and Cxx, Cyx, Cyy."""
        mean_x = self.x_sum / self.count
        mean_y = self.y_sum / self.count
        return (
            mean_x,
            mean_y,
            self.xx / self.count - torch.outer(mean_x, mean_x),
            self.yx / self.count - torch.outer(mean_y, mean_x),
            self.yy / self.count - torch.outer(mean_y, mean_y),
        )


class Fitted(NamedTuple):
    """Weight [D, D] and bias [D] of a fit in float32."""

    weight: np.ndarray
    bias: np.ndarray


def fit(moments: Moments, layer: int, ridge: float = RIDGE, *, bias: bool = True) -> Fitted:
    """The LMMSE map of a layer.

    Args:
        bias: False for the best map whose bias is zero.

    Raises:
        NblError: the statistics hold NaN or infinity, or X does not vary.
    """
    mean_x, mean_y, cxx, cyx, _ = (moments if bias else moments.about_zero()).centred()
    weight = _solve(cxx, cyx, layer, ridge)
    return Fitted(weight.float().numpy(), (mean_y - weight @ mean_x).float().numpy())


def score(moments: Moments, layer: int, ridge: float = RIDGE, *, bias: bool = True) -> LayerScore:
    """Bound and calibration errors of a layer's map; `bias` as in `fit`. Errors are relative to centred moments."""
    _, _, cxx, cyx, cyy = moments.centred()
    error = _error((moments if bias else moments.about_zero()).centred()[2:], layer, ridge)
    c_plus = cxx + cyx + cyx.T + cyy
    lower_x = cholesky(cxx, layer, ridge)
    lower_plus = cholesky(c_plus, layer, ridge)
    half = torch.linalg.solve_triangular(lower_plus, cyx + cxx, upper=False)
    coherence = torch.linalg.solve_triangular(lower_x, half.T, upper=False)
    bound = max(0.0, len(cyy) - coherence.square().sum().item())
    return LayerScore(layer, bound, _ratio(error, cyy.trace()), _ratio(error, c_plus.trace()))


def _error(second: tuple[torch.Tensor, torch.Tensor, torch.Tensor], layer: int, ridge: float) -> torch.Tensor:
    """Mean squared error of the map that is fitted to these second moments."""
    cxx, cyx, cyy = second
    weight = _solve(cxx, cyx, layer, ridge)
    # tr(Cyy - W Cxy - Cyx W' + W Cxx W') holds for every W; at the exact minimum it is tr(Cyy - W Cxy).
    return (cyy.trace() - 2 * (weight * cyx).sum() + ((weight @ cxx) * weight).sum()).clamp_min(0)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> float:
    return (part / whole).item() if whole > 0 else 0.0


def _solve(cxx: torch.Tensor, cyx: torch.Tensor, layer: int, ridge: float) -> torch.Tensor:
    return torch.cholesky_solve(cyx.T, cholesky(cxx, layer, ridge)).T


def cholesky(matrix: torch.Tensor, layer: int, ridge: float) -> torch.Tensor:
    """The lower factor of a second moment [D, D] with a ridge, which is raised tenfold while there is none.

    Sums of float32 products make a moment of fewer than D directions indefinite. At D = 4096 the smallest eigenvalue of
    random rows is -4e-7 of the mean diagonal, near the ridge. Layer 0 with few different tokens can be below it.
    """
    if not torch.isfinite(matrix).all():
        raise NblError(
            f"layer {layer}: the calibration statistics hold NaN or infinity; check the checkpoint's weights"
        )
    scale = matrix.diagonal().mean()
    if scale <= 0:
        raise NblError(f"layer {layer}: its input does not vary over the calibration text; give more varied text")
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype)
    for raised in range(_RAISES + 1):
        factor, info = torch.linalg.cholesky_ex(matrix + (ridge * 10**raised * scale) * identity)
        if not info.item():
            if raised:
                _warn_of_ridge(layer, ridge * 10**raised)
            return factor
    raise NblError(
        f"layer {layer}: the calibration statistics are not positive definite; give more --calibration-tokens"
    )


@functools.cache  # a layer's moments are factored several times
def _warn_of_ridge(layer: int, ridge: float) -> None:
    log.warning(
        "layer %d: the calibration text has too few different inputs for it, so its map has a ridge of %.0e; "
        "give more --calibration-tokens for a better map",
        layer,
        ridge,
    )
