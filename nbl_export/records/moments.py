"""Moments of a calibration, from which maps are fitted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

__all__ = ["Moments"]


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of one layer: raw, uncentred, float64. Only `calibrate.sums.Sums` can be added."""

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
        mean_x, mean_y = self.x_sum / self.count, self.y_sum / self.count
        return (
            mean_x,
            mean_y,
            self.xx / self.count - torch.outer(mean_x, mean_x),
            self.yx / self.count - torch.outer(mean_y, mean_x),
            self.yy / self.count - torch.outer(mean_y, mean_y),
        )
