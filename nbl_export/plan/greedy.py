"""Greedy order in which attention layers are replaced: each round takes the layer that raises KL divergence least.

    order   []  ->  [25]  ->  [25, 28]  ->  ...     KL(original || mix) on held-back text after each round

A shorter order is the front of a longer order. The first round tries every layer. A later round tries only the WIDTH
layers that added least KL when last tried. A layer adds more as other layers are replaced, so a layer that is not
tried already added more.

With `saving` (select "efficient"), a round takes the layer with the least added KL per square root of the work saved.
The topmost attention saves most work, since everything above the last kept attention runs on one token (`cost`). So
the topmost layer is always tried. With the full work instead of its root, SmolLM2's layer 24 outweighs four times the
loss of a middle layer. That layer loses most on text unlike the calibration text (docs/experiments.md).

A trial runs the layers from its own upward (half of them on average) and the head. Cost in decoder passes over the
text: layers / 2 for the first round, and WIDTH / 2 + 1 for every later round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.model.mixes import Loss, SwitchedModel

__all__ = ["EVERY", "WIDTH", "GreedyOrder", "extend", "near_and_far"]

WIDTH = 8
EVERY = 2  # every second position is judged; each position sees all positions before
_NEVER = 1e9  # nats of a layer whose map gives logits that are not finite
_NOTHING = 1e-9  # least share of the work that a layer saves


@dataclass(frozen=True)
class GreedyOrder:
    """Layers in order of replacement, the KL after each, and the KL that each other layer added when last tried.

    KL is in nats.
    """

    layers: tuple[int, ...] = ()
    kl: tuple[float, ...] = ()
    added: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GreedyOrder:
        added = tuple((int(i), float(v)) for i, v in values["added"])
        return cls(tuple(values["layers"]), tuple(values["kl"]), added)


def extend(
    order: GreedyOrder,
    length: int,
    switched: SwitchedModel,
    num_layers: int,
    held_WT: torch.Tensor,
    progress: Callable[[int, int], None],
    saving: Callable[[Sequence[int]], float] | None = None,
) -> GreedyOrder:
    """Extend an order to `length` layers; an order that is long enough is returned unchanged.

    Args:
        held_WT: token ids [windows, context] that no map was fitted on.
        saving: work that replacing these layers saves; None counts layers.

    Raises:
        NblError: a layer's map makes the logits not finite.
    """
    done, total = 0, _trials(len(order.layers), length, num_layers) * len(held_WT)
    while len(order.layers) < length:
        tried = _candidates(order, num_layers, topmost=saving is not None)
        losses = dict.fromkeys(tried, Loss())
        for ids_T in held_WT:
            for layer, loss in _try(switched, ids_T, order.layers, tried).items():
                losses[layer] += loss
            done += len(tried)
            progress(done, total)
        order = _step(order, {layer: loss.kl for layer, loss in losses.items()}, saving or len)
    return order


def near_and_far(near_WT: torch.Tensor, far_WT: torch.Tensor | None) -> torch.Tensor:
    """Windows to judge layers by: all of the calibration text's, and as many spread over the second text's."""
    if far_WT is None:
        return near_WT
    spread = torch.linspace(0, len(far_WT) - 1, min(len(near_WT), len(far_WT))).long()
    return torch.cat([near_WT, far_WT[spread]])


def _trials(start: int, length: int, num_layers: int) -> int:
    return sum(num_layers if k == 0 else min(WIDTH, num_layers - k) for k in range(start, length))


def _candidates(order: GreedyOrder, num_layers: int, *, topmost: bool) -> tuple[int, ...]:
    if not order.layers:
        return tuple(range(num_layers))
    cheapest = [layer for layer, _ in sorted(order.added, key=lambda a: (a[1], a[0]))]
    first = [max(cheapest)] if topmost else []
    return tuple(sorted(list(dict.fromkeys([*first, *cheapest]))[:WIDTH]))


def _try(switched: SwitchedModel, ids_T: torch.Tensor, gone: Sequence[int], tried: Sequence[int]) -> dict[int, Loss]:
    """For each layer tried, the loss on one window if that layer is replaced in addition to `gone`."""
    original, entering = switched.run((), ids_T=ids_T, watch=() if gone else tried)
    if gone:
        _, entering = switched.run(gone, ids_T=ids_T, watch=tried)
    last = {i: switched.run((*gone, i), entering_TD=entering[i], first=i)[0] for i in tried}
    return switched.losses(ids_T, original, last, EVERY)


def _step(order: GreedyOrder, kl: dict[int, float], saving: Callable[[Sequence[int]], float]) -> GreedyOrder:
    before = order.kl[-1] if order.kl else 0.0
    finite = {layer: value for layer, value in kl.items() if math.isfinite(value)}
    if not finite:
        raise NblError(f"the map of layer {min(kl)} gives logits that are not finite; give more --calibration-tokens")
    saved = saving(order.layers)
    work = {i: max(saving((*order.layers, i)) - saved, _NOTHING) for i in finite}
    price = {i: (value - before) / math.sqrt(work[i]) for i, value in finite.items()}
    best = min(price, key=lambda layer: (price[layer], layer))
    added = {**dict(order.added), **{layer: finite.get(layer, _NEVER) - before for layer in kl}}
    del added[best]
    return GreedyOrder((*order.layers, best), (*order.kl, finite[best]), tuple(sorted(added.items())))
