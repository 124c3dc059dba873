"""KL and cross entropy from changes of logits, against float64."""

from __future__ import annotations

import pytest
import torch

from nbl_export.model.head import divergence

ROWS, MIXES, WORDS = 6, 3, 50


@pytest.mark.parametrize("sharp", [1.0, 30.0], ids=["flat", "sure"])
@pytest.mark.parametrize(
    ("size", "shift", "peak"),
    [(1e-3, 0, 0), (1, 0, 0), (1, -15, 0), (1, -70, 0), (1, 60, 0), (1, 0, 120), (1, -60, 100), (30, 0, 0)],
)
def test_kl_and_rise_keep_their_digits(size: float, shift: float, peak: float, sharp: float) -> None:
    """Also if all logits move together, by which nothing changes, or one of them moves far."""
    made = torch.Generator().manual_seed(0)
    logits = sharp * torch.randn(ROWS, WORDS, generator=made, dtype=torch.float64)
    apart = size * torch.randn(ROWS, MIXES, WORDS, generator=made, dtype=torch.float64) + shift
    apart[0, 0, 7] += peak
    apart = apart.float().double()
    target = torch.arange(ROWS)
    before, after = logits.log_softmax(1)[:, None], (logits[:, None] + apart).log_softmax(2)
    kl = (before.exp() * (before - after)).sum(2)
    rise = (before - after).gather(2, target[:, None, None].expand(-1, MIXES, 1))[..., 0]
    got = divergence(before[:, 0].exp().float(), apart.float(), target)
    near = {"rtol": 1e-4, "atol": 1e-6 * max(1.0, abs(shift), peak, size)}
    torch.testing.assert_close(got[0].double(), kl, **near)
    torch.testing.assert_close(got[1].double(), rise, **near)
