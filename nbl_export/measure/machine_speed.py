"""Two rates of this machine, which an estimate divides work by: float32 products and copies in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from nbl_export.measure.roofline import best_seconds

__all__ = ["Speed", "measure_speed"]

_ROWS, _WIDTH, _COPIED_BYTES, _REPETITIONS = 512, 1024, 64 << 20, 4


@dataclass(frozen=True)
class Speed:
    """Rates of a machine."""

    product_flops_per_second: float
    copied_bytes_per_second: float


@functools.cache  # each process measures once
def measure_speed() -> Speed:
    """Rates of this machine, in a tenth of a second; other programs that run at the same time make them too low."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((_ROWS, _WIDTH), (_WIDTH, _WIDTH)))
    source = np.ones(_COPIED_BYTES // 8)
    target = np.zeros_like(source)
    product = best_seconds(lambda: x @ weight, _REPETITIONS)
    copy = best_seconds(lambda: np.copyto(target, source), _REPETITIONS)
    return Speed(2.0 * _ROWS * _WIDTH**2 / product, source.nbytes / copy)
