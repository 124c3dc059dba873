"""Waiting until no thread of the process computes."""

from __future__ import annotations

import itertools

import pytest

from nbl_export.measure.idle import wait_until_idle


@pytest.mark.parametrize(
    ("cores_used", "looks"),
    [((0.0,), 1), ((1.0, 1.0, 0.9, 0.1), 4), ((0.19,), 1), ((0.21, 0.0), 2), (itertools.repeat(1.0), 30)],
)
def test_waits_while_a_fifth_of_a_core_is_used_and_no_longer_than_the_limit(
    cores_used: tuple[float, ...], looks: int
) -> None:
    slept: list[float] = []
    used, shares = 0.0, iter(cores_used)

    def sleep(seconds: float) -> None:
        nonlocal used
        slept.append(seconds)
        used += seconds * next(shares)

    idle = wait_until_idle(lambda: used, sleep, limit=0.3)
    assert len(slept) == looks
    assert idle is (looks < 30)  # it says that it gave up
    assert sum(slept) <= 0.3 + 1e-9
