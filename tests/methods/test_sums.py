"""Sums over rows: not a bit depends on the order of the parts."""

from __future__ import annotations

import numpy as np
import torch

from nbl_export.methods.sums import Accumulator
from tests.tiny import HIDDEN


def test_sums_do_not_depend_on_order_where_plain_float64_ones_do() -> None:
    """Batches of very different size: added without the grid, the last bits depend on the order."""
    generator = torch.Generator().manual_seed(0)
    scales = [30.0, *10 ** np.random.default_rng(0).uniform(-6, 1.5, 40)]
    rows = [torch.randn(2, 256, HIDDEN, generator=generator) * scale for scale in scales]
    rows[0][:, 1::2] = -rows[0][:, ::2]  # a reference of zero, which leaves small rows small
    found, plain = [], []
    for order in (range(41), [0, *range(40, 0, -1)], [0, *range(1, 41, 2), *range(2, 41, 2)]):
        accumulator = Accumulator()
        for k in order:
            accumulator.update(*rows[k])
        found.append(accumulator.sums())
        plain.append(sum((rows[k][0].T @ rows[k][0]).double() for k in order))
    assert not all(torch.equal(plain[0], other) for other in plain[1:])
    for other in found[1:]:
        for name, value in vars(found[0]).items():
            assert torch.equal(torch.as_tensor(getattr(other, name)), torch.as_tensor(value)), name


def test_sums_go_on_from_where_they_were() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 300, HIDDEN, generator=generator) * torch.logspace(-3, 3, HIDDEN) for _ in range(3)]
    through, first, second = (Accumulator() for _ in range(3))
    for x, y in rows:
        through.update(x, y)
    first.update(*rows[0])
    second.restore(first.sums())
    for x, y in rows[1:]:
        second.update(x, y)
    for name, value in vars(through.sums()).items():
        assert torch.equal(torch.as_tensor(getattr(second.sums(), name)), torch.as_tensor(value)), name
