"""Effects of replaced layers on the model's output, at judged positions of some text.

    d = h' - h                               change of the last hidden state [D], after the final norm
    a = head(h') - head(h),  p = softmax(head(h))
    KL = log E_p exp(a) - E_p a                               exact
       = 1/2 Var_p(a) + ... = 1/2 d' F d + ...                F = J' (diag p - p p') J,  J = d head / d h

For changes d_i and d_j of two layers, d_i' F d_j is the part of the KL that only both together cause. So the effects of
each layer alone estimate the KL of every set of layers, as far as the changes add up (`greedy`). The `pull` F d of each
layer makes d_i' F d_j cheap, also for a change d_i that is measured later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from nbl_export.model.head import divergence
from nbl_export.model.switched import SwitchedModel

__all__ = ["EVERY", "Effects", "Judge"]

EVERY = 4  # every fourth position is judged; each position sees all positions before
_BLOCK_BYTES = 64 << 20  # of the changes of logits that are held at once


@dataclass(frozen=True)
class Effects:
    """Effects of K mixes at N judged positions, in float32.

    rise: of the cross entropy of the next token, in nats. square: Var_p(a), which d' F d is.
    """

    change_NKD: torch.Tensor
    kl_NK: torch.Tensor
    rise_NK: torch.Tensor
    square_NK: torch.Tensor
    pull_NKD: torch.Tensor | None = None

    def __getitem__(self, k: int) -> Effects:
        """The effects of one of the mixes (K = 1)."""
        return Effects(*(value if value is None else value[:, k : k + 1] for value in vars(self).values()))

    def split(self, parts: Sequence[int]) -> list[Effects]:
        """The effects at consecutive groups of positions."""
        none = [None] * len(parts)
        columns = (none if value is None else value.split(list(parts)) for value in vars(self).values())
        return [Effects(*values) for values in zip(*columns, strict=True)]

    def gram(self, other: Effects) -> torch.Tensor:
        """Mean of d_i' F d_j over positions, [K, K of other], in float64; `other` has its pull."""
        assert other.pull_NKD is not None
        ours, theirs = (v.transpose(0, 1).flatten(1) for v in (self.change_NKD, other.pull_NKD))
        return (ours @ theirs.T).double() / len(self.kl_NK)


class Judge:
    """Runs mixes on judging windows and measures their effects.

    Args:
        switched: the model with the maps of all layers.
        texts: token ids [windows, context] of each text; no map was fitted on them.
    """

    def __init__(self, switched: SwitchedModel, texts: Sequence[torch.Tensor]) -> None:
        ids_WT = torch.cat(list(texts))
        self._switched, self._head = switched, switched.head
        self._rows = torch.arange(0, ids_WT.shape[1] - 1, EVERY)
        self._target_N = ids_WT[:, self._rows + 1].flatten()
        original, self._entering = switched.run((), ids_BT=ids_WT, watch=range(switched.num_layers))
        self._original_ND = self._judged(original)
        self.parts = [len(text) * len(self._rows) for text in texts]  # judged positions of each text

    @property
    def num_layers(self) -> int:
        return self._switched.num_layers

    def alone(self, progress: Callable[[int, int], None]) -> Effects:
        """The effects of each layer alone (K: all layers)."""
        changes = []
        for layer in range(self.num_layers):
            changes.append(self._change((layer,)))
            progress(layer + 1, self.num_layers)
        return self._effects(torch.stack(changes, 1), pulled=True)

    def together(self, replaced_set: Collection[int]) -> Effects:
        """The effects of a mix (K = 1), without its pull."""
        return self._effects(self._change(replaced_set)[:, None], pulled=False)

    def _change(self, replaced_set: Collection[int]) -> torch.Tensor:
        first = min(replaced_set)
        last, _ = self._switched.run(replaced_set, entering_BTD=self._entering[first], first=first)
        return self._judged(last) - self._original_ND

    def _judged(self, last_BTD: torch.Tensor) -> torch.Tensor:
        return last_BTD[:, self._rows].flatten(0, 1).float()

    @torch.no_grad()
    def _effects(self, change_NKD: torch.Tensor, *, pulled: bool) -> Effects:
        positions, count, _ = change_NKD.shape
        rows = max(1, _BLOCK_BYTES // (4 * count * self._head.size))
        found = [self._measure(part_N, change_NKD[part_N], pulled) for part_N in torch.arange(positions).split(rows)]
        return Effects(change_NKD, *(torch.cat(values) for values in zip(*found, strict=True)))

    def _measure(self, part_N: torch.Tensor, change_NKD: torch.Tensor, pulled: bool) -> tuple[torch.Tensor, ...]:
        """KL, rise of the loss, variance and, if wanted, pull at some positions."""
        base_NV = self._head.near_logits(self._original_ND[part_N])
        share_NV = base_NV.softmax(1)
        narrow_NKV = self._head.changes(base_NV, change_NKD)
        apart_NKV = narrow_NKV.float()
        mean_NK1, square_NK1 = apart_NKV @ share_NV[..., None], apart_NKV.square() @ share_NV[..., None]
        pull: tuple[torch.Tensor, ...] = ()
        if pulled:
            typed_N1V = share_NV[:, None].to(narrow_NKV.dtype)
            common_N1D = self._head.pull(base_NV, typed_N1V)
            pull = (self._head.pull(base_NV, narrow_NKV * typed_N1V) - mean_NK1 * common_N1D,)
        variance_NK = (square_NK1 - mean_NK1.square())[..., 0]
        return *divergence(share_NV, apart_NKV, self._target_N[part_N]), variance_NK, *pull
