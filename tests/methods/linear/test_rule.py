"""The rule that orders layers has a number, and its number changes with it.

Raw results in bench/results name the number of the rule that chose their layers. If a test here fails, the rule of
today is another: raise `greedy.RULE`, record what the rule gives here, and measure the results of the old rule again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import torch

from nbl_export.methods.linear import order as selection
from nbl_export.methods.linear.greedy import EVERY, RULE, Effects, Judge, Search
from nbl_export.text.windows import DIVISION, selection_texts

LAYERS, POSITIONS, SIZE = 14, 24, 6
# What each rule makes of the planted effects: the order of 9 layers.
ORDERS = {2: (9, 13, 7, 1, 4, 11, 3, 5, 12)}
_RECENT = ["validation", "selection", "validation", "test", "test", "validation", "validation"]
_SECOND = ["unused", "validation", "selection", "selection", "test", "validation"]
_LOOKS = 3  # of a test
_TEXTS = [2048, 2048, 2048]  # tokens of the calibration text, of the second text, and of repeated passages
JUDGED: dict[int, tuple[object, ...]] = {2: (4, 512, [[_RECENT, 4096], [_SECOND, 8192], _LOOKS], _TEXTS)}


class Planted(Judge):
    """A judge of two texts whose layers change the output in random directions, more together than apart."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.num_layers, self.parts = LAYERS, [POSITIONS // 2, POSITIONS // 2]
        self._changes = torch.randn(POSITIONS, LAYERS, SIZE, generator=random) * torch.rand(LAYERS, 1, generator=random)
        self._rises = torch.rand(POSITIONS, LAYERS, generator=random)

    def alone(self, progress: object) -> Effects:
        return self._effects([(i,) for i in range(LAYERS)])

    def together(self, replaced_set: Collection[int]) -> Effects:
        return self._effects([tuple(replaced_set)])

    def _effects(self, replaced_sets: Sequence[tuple[int, ...]]) -> Effects:
        change = torch.stack([self._changes[:, list(replaced_set)].sum(1) for replaced_set in replaced_sets], 1)
        square = change.square().sum(2)
        neighbours = torch.tensor(
            [float(sum(i + 1 in replaced_set for i in replaced_set)) for replaced_set in replaced_sets]
        )
        rise = torch.stack([self._rises[:, list(replaced_set)].sum(1) for replaced_set in replaced_sets], 1)
        return Effects(change, square / 2 + neighbours, rise + neighbours, square, change)


def saving(gone: Sequence[int]) -> float:
    """More for each layer of an unbroken row at the top, as pruned tails give it."""
    tail = next(n for n in range(LAYERS + 1) if LAYERS - 1 - n not in gone)
    return 0.01 * len(gone) + 0.03 * tail


def test_the_order_is_that_of_the_rule() -> None:
    assert Search(Planted(), (), saving, lambda _d, _t: None).extend(9)[-1].layers == ORDERS[RULE]


def test_layers_are_judged_by_what_the_rule_says() -> None:
    windows = torch.arange(8192).view(16, 512)
    tokens = [
        windows.numel() for _, windows in selection_texts([("recent_tokens", windows), ("second", windows)], 8192)
    ]
    judged = (EVERY, selection._WEIGHED_TOKENS, json.loads(json.dumps(DIVISION)), tokens)
    assert judged == JUDGED[RULE]
