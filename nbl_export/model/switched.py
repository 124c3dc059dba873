"""The original and every mix of attention and maps in one torch model, and a mix's loss against the original.

    layers        0 .. a-1        a .. n-1                    a: the lowest layer in which two mixes differ
    mixes    same hidden states | run from `entering` at a    so layers below a are computed once for all mixes

One copy of the weights serves all mixes: during a run, the layers of a mix compute their maps instead of attention. The
model is unchanged afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.mixers.base import Mixer
from nbl_export.model import bfloat16
from nbl_export.model.head import Head, divergence
from nbl_export.model.linearize import multiplier_of, run_from, switched

__all__ = ["Loss", "SwitchedModel"]

_LOGIT_ROWS = 256  # positions whose logits are held at once
_BATCH_TOKENS = 2048  # windows that run at once


@dataclass(frozen=True)
class Loss:
    """Sums over positions, in nats: KL(original || mix), and the cross entropy of both. Losses can be added."""

    positions: int = 0
    kl_sum: float = 0.0
    original_sum: float = 0.0
    nbl_sum: float = 0.0

    def __add__(self, other: Loss) -> Loss:
        return Loss(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def kl(self) -> float:
        return self.kl_sum / self.positions

    @property
    def perplexities(self) -> tuple[float, float]:
        """Of the original and of the mix."""
        return _exp(self.original_sum / self.positions), _exp(self.nbl_sum / self.positions)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


class SwitchedModel:
    """A causal LM of transformers whose layers are switched between attention and map.

    Args:
        maps: of every layer that a mix may replace.
        tap: what the maps act on (`records.plan.TAPS`).
        narrow: products in bfloat16; logits of the original stay float32.
    """

    def __init__(self, model: Any, maps: Mapping[int, Mixer], tap: str, *, narrow: bool = False) -> None:
        self.model, self._narrow = model, narrow
        self.head = Head(model, narrow=narrow)
        self._decoder = model.get_decoder()
        self._layers = self._decoder.layers
        self._tap = tap
        self.num_layers = len(self._layers)
        self._affine = {i: m.module(multiplier_of(model.config)).eval().to(model.device) for i, m in maps.items()}

    @torch.no_grad()
    def run(
        self, replaced_set: Collection[int], *, ids_BT: torch.Tensor | None = None,
        entering_BTD: torch.Tensor | None = None, first: int = 0, watch: Collection[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:  # fmt: skip
        """Run a mix on some windows, from their tokens or from the hidden states that enter layer `first`.

        Returns:
            the last hidden states [B, T, D] (after the final norm), and the states that enter the watched layers.
        """
        seen: dict[int, torch.Tensor] = {}

        def note(layer: int) -> Any:
            return lambda _module, args: seen.__setitem__(layer, args[0])

        handles = [self._layers[i].register_forward_pre_hook(note(i)) for i in watch]
        try:
            with (
                bfloat16.products(self.model.device, self._narrow),
                switched(self._decoder, {i: self._affine[i] for i in replaced_set}, self._tap, first),
            ):
                if ids_BT is not None:
                    last = self._decoder(input_ids=ids_BT.to(self.model.device), use_cache=False).last_hidden_state
                else:
                    assert entering_BTD is not None
                    last = run_from(self._decoder, entering_BTD)
        finally:
            for handle in handles:
                handle.remove()
        return last, seen

    @torch.no_grad()
    def losses(
        self, ids_T: torch.Tensor, original_TD: torch.Tensor, replaced_sets: Mapping[Any, torch.Tensor]
    ) -> dict[Any, Loss]:
        """Each mix's loss on one window, from last hidden states; the original's logits are computed once."""
        changes = {name: last_TD - original_TD for name, last_TD in replaced_sets.items()}
        found = dict.fromkeys(replaced_sets, Loss())
        for rows in torch.arange(0, len(ids_T) - 1).split(_LOGIT_ROWS):
            target_N = ids_T[rows + 1].to(self.model.device)
            base_NV = self.head.logits(original_TD[rows])
            base = torch.nn.functional.cross_entropy(base_NV, target_N, reduction="sum").item()
            share_NV = base_NV.softmax(1)
            for name, change_TD in changes.items():
                apart_NKV = self.head.changes(base_NV, change_TD[rows][:, None]).float()
                kl, rise = (v.sum(dtype=torch.float64).item() for v in divergence(share_NV, apart_NKV, target_N))
                found[name] += Loss(len(rows), kl, base, base + rise)
        return found

    def quality_loss(self, windows_WT: Any, replaced_set: Collection[int]) -> Loss:
        """A mix's loss on token ids [windows, context], a tensor or an array."""
        return self.quality_losses(windows_WT, {"mix": replaced_set})["mix"]

    def quality_losses(
        self,
        windows_WT: Any,
        replaced_sets: Mapping[Any, Collection[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[Any, Loss]:
        """The loss of each of several mixes on some text; the original runs once for all mixes."""
        found = self.window_losses(windows_WT, replaced_sets, progress)
        return {name: sum(losses, Loss()) for name, losses in found.items()}

    def window_losses(
        self,
        windows_WT: Any,
        replaced_sets: Mapping[Any, Collection[int]],
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[Any, list[Loss]]:
        """As `quality_losses`, for each window separately."""
        found: dict[Any, list[Loss]] = {name: [] for name in replaced_sets}
        lowest = {name: min(replaced_set) for name, replaced_set in replaced_sets.items() if replaced_set}
        windows_WT = torch.as_tensor(windows_WT)
        for ids_BT in windows_WT.split(max(1, _BATCH_TOKENS // windows_WT.shape[1])):
            original, seen = self.run((), ids_BT=ids_BT, watch=set(lowest.values()))
            last = dict.fromkeys(replaced_sets, original)
            for name, first in lowest.items():
                last[name] = self.run(replaced_sets[name], entering_BTD=seen[first], first=first)[0]
            for k, ids_T in enumerate(ids_BT):
                for name, loss in self.losses(ids_T, original[k], {n: v[k] for n, v in last.items()}).items():
                    found[name].append(loss)
            if progress is not None:
                progress(sum(map(len, found.values())) // max(1, len(replaced_sets)), len(windows_WT))
        return found
