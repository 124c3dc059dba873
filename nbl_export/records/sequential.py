"""Looks of a test: how many windows of a text are read before a verdict is sought, and the level of each look.

    windows of a text ─► look 1, spread over the text ─► interval ─► within the limit, or beyond it: reading ends
                                                            └─► undecided: look 2, twice as many windows ─► look 3

The interval of a look has one level for all looks (Pocock 1977, Group Sequential Methods in the Design and Analysis of
Clinical Trials, Biometrika 64). The level is such that the upper ends of all looks are above the truth together with a
probability of 97.5%, and so are the lower ends below it. So a look's interval holds at 95% whenever reading ends
(Jennison and Turnbull 1989, Interim Analyses: The Repeated Confidence Interval Approach, J. R. Statist. Soc. B 51).

The constant is that of normal windows whose variance is known, integrated look by look (Armitage, McPherson and Rowe
1969, Repeated Significance Tests on Accumulating Data, J. R. Statist. Soc. A 132). The number of looks follows from the
length of the text alone. `bench/looks.py` simulates level and power.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

__all__ = ["LOOKS", "ONE_SIDED", "describe_looks", "level", "looks_of", "order_of"]

LOOKS = 3  # at most; each reads twice as many windows as the one before
ONE_SIDED = 0.025  # error of one end over all looks
_FAR = 8.0  # standard deviations: what lies beyond counts as nothing
_NODES = 64  # of an integral


def looks_of(windows: int, first: int) -> tuple[int, ...]:
    """Windows read at the end of each look, of a text of so many windows; the text may end the looks.

    Args:
        first: windows of the first look.
    """
    if windows <= first:
        return (windows,)
    sizes = [first << look for look in range(LOOKS)]
    return (*(size for size in sizes[:-1] if size < windows), min(windows, sizes[-1]))


def order_of(windows: int, looks: Sequence[int]) -> list[int]:
    """Windows of a text in the order of reading: those of each look are spread over the whole text."""
    read: dict[int, None] = {}
    for size in looks:
        read |= dict.fromkeys(k * windows // size for k in range(size))
    return list(read)


@functools.cache
def level(looks: tuple[int, ...]) -> float:
    """The two-sided level of the interval of each look.

    Args:
        looks: windows read at the end of each look, ascending.
    """
    low = 0.0
    high = _FAR
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _crossed(middle, looks) > ONE_SIDED else (low, middle)
    return math.erf(high / math.sqrt(2))


def describe_looks(windows: int, looks: Sequence[int]) -> str:
    """At which look reading ended: "look 1 of 3", and whether the text has no windows for another look."""
    if windows not in looks:
        return ""
    ended = windows == looks[-1] and len(looks) < LOOKS
    return f"look {looks.index(windows) + 1} of {len(looks)}{', where the text ends' if ended else ''}"


def _crossed(bound: float, looks: Sequence[int]) -> float:
    """P(the sum of n standard normal values is above bound sqrt(n) at any look)."""
    nodes_N, weights_N = np.polynomial.legendre.leggauss(_NODES)
    sums_N = np.zeros(1)
    mass_N = np.ones(1)
    crossed = 0.0
    read = 0
    for size in looks:
        spread = math.sqrt(size - read)
        edge = bound * math.sqrt(size)
        above_N = [math.erfc((edge - reached) / spread / math.sqrt(2)) / 2 for reached in sums_N]
        crossed += float(mass_N @ above_N)
        begin = -_FAR * math.sqrt(size)
        next_N = begin + (edge - begin) * (nodes_N + 1) / 2
        density_NN = np.exp(-(((next_N[:, None] - sums_N) / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))
        mass_N = weights_N * (edge - begin) / 2 * (density_NN @ mass_N)
        sums_N = next_N
        read = size
    return crossed
