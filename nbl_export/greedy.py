"""The order in which attention layers are given up, each time the one whose loss the model's output feels least.

    order   []  ->  [25]  ->  [25, 28]  ->  ...     KL(original || mix) on held-back text after each

The order does not depend on how many layers are wanted: what is wanted fewer of is the front of what is wanted more
of. After the first round, which tries every layer, a round tries only the WIDTH layers that added least when they
were last tried. What a layer adds grows as others go, so a layer that is not tried is one that was dearer already.

With `saving` (select "efficient") the layer goes that loses least for the work it saves: the topmost attention saves
most, since everything above the last kept one runs on one token (`cost`), so it is always tried. Work counts by its
square root: by its full amount SmolLM2's layer 24 was worth four times the loss of a layer in the middle, and cost most
on text unlike that of calibration (bench/README.md).

Cost, in passes of the decoder over the text (a trial runs the layers from its own upward, half of them on average,
and the head): layers / 2 for the first round and WIDTH / 2 + 1 for every further one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.switched import Loss, SwitchedModel

__all__ = ["EVERY", "WIDTH", "GreedyOrder", "extend", "near_and_far"]

WIDTH = 8
EVERY = 2  # positions; each is judged with all before it
_NEVER = 1e9  # nats: of a layer whose map gives logits that are not finite
_NOTHING = 1e-9  # of the work: what a layer saves at least


@dataclass(frozen=True)
class GreedyOrder:
    """Layers in the order they go, the KL after each, and what each layer not gone added when last tried (nats)."""

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
    """Bring an order to `length` layers; one that is as long already comes back as it is.

    Args:
        held_WT: token ids [windows, context] that no map was fitted on.
        saving: work that giving up these layers saves; None counts layers.

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
    """Windows to judge layers by: all that are near what was calibrated on, and as many spread over what is far."""
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
    """The loss on one window of what is gone and one layer more, for each layer tried."""
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
