"""What planning reads of a model: last hidden states of mixes of attention and maps, and losses against the original.

    layers        0 .. a-1        a .. n-1                    a: the lowest stream that a layer of the mix reads
    mixes    same hidden states | run from `entering` at a    so layers below a are computed once for all mixes

A mix is named by its replaced set: the layers that compute their maps instead of attention. One copy of the weights
serves all mixes. The model is unchanged after each run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from nbl_export.methods.applied import multiplier_of, run_from, switched
from nbl_export.methods.base import Mixer
from nbl_export.methods.rows import lowest_stream
from nbl_export.model import bfloat16, processes
from nbl_export.model.head import Head, divergence
from nbl_export.model.mapped import on_disk

__all__ = ["CachedHiddenStates", "Loss", "PartialReplacement", "Progress", "quiet"]

Progress = Callable[[int, int], None]  # done, all

_LOGIT_ROWS = 256  # positions whose logits are held at once


def quiet(_done: int, _total: int) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Loss:
    """Sums over positions, in nats: KL(original || mix), and the cross entropy of both. Losses can be added."""

    positions: int = 0
    kl_sum: float = 0.0
    original_sum: float = 0.0
    nbl_sum: float = 0.0

    @staticmethod
    def of(values: Sequence[float]) -> Loss:
        """From the values of its fields in order."""
        positions, *sums = values
        return Loss(int(positions), *sums)

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


class PartialReplacement:
    """A causal LM of transformers whose layers are switched between attention and map.

    Args:
        maps: of every layer that a mix may replace.
        tap: what the maps act on (`records.plan.TAPS`).
        bf16_matmul: products in bfloat16; logits of the original stay float32.
        scratch: a directory for hidden states that are kept; None keeps them in memory. A model larger than memory
            (`model.mapped`) has one.

    Attributes:
        num_layers: of the decoder.
        most_tokens: of windows that run at once in `window_losses`.
        head: of the original.
    """

    def __init__(
        self, model: Any, maps: Mapping[int, Mixer], tap: str, *, bf16_matmul: bool = False, scratch: Path | None = None
    ) -> None:
        self.model = model
        self._bf16_matmul = bf16_matmul
        self._scratch = scratch
        self.most_tokens = 2048 if scratch is None else 8192  # each run reads all weights of a mapped model
        self.head = Head(model, bf16_matmul=bf16_matmul)
        self._decoder = model.get_decoder()
        self._layers = self._decoder.layers
        self._tap = tap
        self.num_layers = len(self._layers)
        self._reads = {i: mixer.reads for i, mixer in maps.items()}
        self._modules = {i: m.module(multiplier_of(model.config)).eval().to(model.device) for i, m in maps.items()}

    def runs(self, ids_WT: torch.Tensor, *, again: bool) -> CachedHiddenStates:
        """Mixes on some windows.

        Args:
            again: mixes are asked for more than once, so what all of them have in common is kept.
        """
        return CachedHiddenStates(self, ids_WT, again)

    def first(self, replaced_set: Collection[int]) -> int:
        """The lowest stream that the layers of a mix read."""
        return lowest_stream({i: self._reads[i] for i in replaced_set})

    @torch.no_grad()
    def run(
        self,
        replaced_set: Collection[int],
        *,
        ids_BT: torch.Tensor | None = None,
        entering_BTD: torch.Tensor | None = None,
        first: int = 0,
        watch: Collection[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Run a mix on some windows, from their tokens or from the hidden states that enter layer `first`.

        Returns:
            the last hidden states [B, T, D] (after the final norm), and the states that enter the watched layers.
        """
        seen: dict[int, torch.Tensor] = {}

        def note(layer: int) -> Any:
            return lambda _module, args: seen.__setitem__(layer, self._kept(args[0]))

        handles = [self._layers[i].register_forward_pre_hook(note(i)) for i in watch]
        try:
            with (
                bfloat16.bf16_autocast(self.model.device, self._bf16_matmul),
                switched(self._decoder, {i: self._modules[i] for i in replaced_set}, self._tap, first),
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

    def _kept(self, entering_BTD: torch.Tensor) -> torch.Tensor:
        """Hidden states that later runs begin with."""
        return entering_BTD if self._scratch is None else on_disk(entering_BTD.shape, self._scratch).copy_(entering_BTD)

    @torch.no_grad()
    def losses(
        self,
        ids_T: torch.Tensor,
        original_TD: torch.Tensor,
        replaced_sets: Mapping[Any, torch.Tensor],
        positions_N: torch.Tensor | None = None,
        each: list[torch.Tensor] | None = None,
    ) -> dict[Any, Loss]:
        """Each mix's loss on one window, from last hidden states; the original's logits are computed once.

        Args:
            positions_N: those that are judged; None judges all.
            each: gets the original's losses at these positions, as those of `cross_entropies`, in parts.
        """
        judged_N = torch.arange(len(ids_T) - 1) if positions_N is None else positions_N
        changes = {name: last_TD - original_TD for name, last_TD in replaced_sets.items()}
        found = dict.fromkeys(replaced_sets, Loss())
        for rows in judged_N.split(_LOGIT_ROWS):
            target_N = ids_T[rows + 1].to(original_TD.device)
            base_NV = self.head.logits(original_TD[rows])
            base_N = torch.nn.functional.cross_entropy(base_NV, target_N, reduction="none")
            base = base_N.sum(dtype=torch.float64).item()
            if each is not None:
                each.append(base_N.cpu())
            share_NV = base_NV.softmax(1)
            for name, change_TD in changes.items():
                apart_NKV = self.head.changes(base_NV, change_TD[rows][:, None]).float()
                kl, rise = (v.sum(dtype=torch.float64).item() for v in divergence(share_NV, apart_NKV, target_N))
                found[name] += Loss(len(rows), kl, base, base + rise)
        return found

    @torch.no_grad()
    def cross_entropies(self, last_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """The original's loss [N] in nats, from last hidden states and the tokens that follow."""
        pairs = zip(last_ND.split(_LOGIT_ROWS), target_N.to(last_ND.device).split(_LOGIT_ROWS), strict=True)
        found = [
            torch.nn.functional.cross_entropy(self.head.logits(last), target, reduction="none")
            for last, target in pairs
        ]
        return torch.cat(found).cpu()

    def quality_losses(
        self, windows_WT: Any, replaced_sets: Mapping[Any, Collection[int]], progress: Progress = quiet
    ) -> dict[Any, Loss]:
        """The loss of each of several mixes on token ids [windows, context]; the original runs once for all mixes."""
        found = self.window_losses(windows_WT, replaced_sets, progress)
        return {name: sum(losses, Loss()) for name, losses in found.items()}

    def window_losses(
        self, windows_WT: Any, replaced_sets: Mapping[Any, Collection[int]], progress: Progress = quiet
    ) -> dict[Any, list[Loss]]:
        """As `quality_losses`, for each window separately."""
        windows_WT = torch.as_tensor(windows_WT)
        at_once = max(1, self.most_tokens // windows_WT.shape[1])
        total = len(windows_WT)
        done = 0
        found_SWL = torch.zeros(len(replaced_sets), total, len(fields(Loss)), dtype=torch.float64)
        parts = windows_WT.split(at_once)
        for part in processes.rank_slice(len(parts)):
            ids_BT = parts[part]
            runs = self.runs(ids_BT, again=False)
            scaled = _scaled(progress, done, processes.count() * len(ids_BT), total)
            last = dict(zip(replaced_sets, runs.last(list(replaced_sets.values()), scaled), strict=True))
            for k, ids_T in enumerate(ids_BT):
                losses = self.losses(ids_T, runs.original[k], {n: v[k] for n, v in last.items()})
                rows = [astuple(losses[name]) for name in replaced_sets]
                found_SWL[:, part * at_once + k] = torch.tensor(rows, dtype=torch.float64)
            done = min(total, done + processes.count() * len(ids_BT))
            progress(done, total)
        summed = processes.all_reduce_sum(found_SWL).tolist()
        return {name: [Loss.of(row) for row in rows] for name, rows in zip(replaced_sets, summed, strict=True)}


def _scaled(progress: Progress, before: int, part: int, total: int) -> Progress:
    """Progress of a part that begins after `before` of all `total`."""
    return lambda done, of: progress(before + part * done // max(1, of), total)


class CachedHiddenStates:
    """Mixes on the same windows. All hidden states are [windows, context, D].

    The original runs at first use. Each mix runs from the original's states at the lowest stream that it reads.
    """

    def __init__(self, model: PartialReplacement, ids_BT: torch.Tensor, again: bool) -> None:
        self._model = model
        self._ids_BT = ids_BT
        self._again = again
        self._original: torch.Tensor | None = None
        self._entering: dict[int, torch.Tensor] = {}

    def of(self, model: PartialReplacement) -> CachedHiddenStates:
        """The same windows in the same model with other mixers, without another run of the original."""
        self.original  # noqa: B018
        others = copy.copy(self)
        others._model = model
        return others

    @property
    def original(self) -> torch.Tensor:
        """The original's last hidden states, after the final norm."""
        if self._original is None:
            self._begin(())
        assert self._original is not None
        return self._original

    def last(self, replaced_sets: Sequence[Collection[int]], progress: Progress = quiet) -> Iterator[torch.Tensor]:
        """The last hidden states of each mix, in order."""
        firsts = {self._model.first(replaced_set) for replaced_set in replaced_sets if replaced_set}
        if not firsts <= self._entering.keys():
            self._begin(firsts)
        for k, replaced_set in enumerate(replaced_sets):
            if replaced_set:
                first = self._model.first(replaced_set)
                yield self._model.run(replaced_set, entering_BTD=self._entering[first], first=first)[0]
            else:
                yield self.original
            progress(k + 1, len(replaced_sets))

    def _begin(self, firsts: Collection[int]) -> None:
        watch = range(self._model.num_layers) if self._again else firsts
        self._original, self._entering = self._model.run((), ids_BT=self._ids_BT, watch=watch)
