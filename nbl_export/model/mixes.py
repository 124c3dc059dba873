"""What planning reads of a model: last hidden states of mixes of attention and maps, and losses against the original.

    SwitchedModel    the whole model in memory                      (`model.switched`)
    StreamedModel    one decoder layer in memory at a time          (`model.streamed`)

A mix is named by its replaced set: the layers that compute their maps instead of attention.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch

from nbl_export.model import processes
from nbl_export.model.head import Head, divergence

__all__ = ["Loss", "Mixes", "Progress", "Runs", "quiet"]

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


class Runs(ABC):
    """Mixes on the same windows. All hidden states are [windows, context, D]."""

    _model: Any  # the `Mixes` that these are of

    def of(self, mixes: Mixes) -> Runs:
        """The same windows in the same model with other mixers, without another run of the original."""
        self.original  # noqa: B018
        others = copy.copy(self)
        others._model = mixes
        return others

    @property
    @abstractmethod
    def original(self) -> torch.Tensor:
        """The original's last hidden states, after the final norm."""

    @abstractmethod
    def last(self, replaced_sets: Sequence[Collection[int]], progress: Progress = quiet) -> Iterator[torch.Tensor]:
        """The last hidden states of each mix, in order."""


class Mixes(ABC):
    """A decoder in which any set of layers can be replaced.

    Attributes:
        num_layers: of the decoder.
        most_tokens: of windows that run at once in `window_losses`; None runs all.
    """

    num_layers: int
    most_tokens: int | None = None

    @property
    @abstractmethod
    def head(self) -> Head:
        """The head of the original."""

    @abstractmethod
    def runs(self, ids_WT: torch.Tensor, *, again: bool) -> Runs:
        """Mixes on some windows.

        Args:
            again: mixes are asked for more than once, so what all of them have in common is kept.
        """

    @torch.no_grad()
    def losses(
        self, ids_T: torch.Tensor, original_TD: torch.Tensor, replaced_sets: Mapping[Any, torch.Tensor],
        positions_N: torch.Tensor | None = None, each: list[torch.Tensor] | None = None,
    ) -> dict[Any, Loss]:  # fmt: skip
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

    def quality_loss(self, windows_WT: Any, replaced_set: Collection[int]) -> Loss:
        """A mix's loss on token ids [windows, context], a tensor or an array."""
        return self.quality_losses(windows_WT, {"mix": replaced_set})["mix"]

    def quality_losses(
        self, windows_WT: Any, replaced_sets: Mapping[Any, Collection[int]], progress: Progress = quiet
    ) -> dict[Any, Loss]:
        """The loss of each of several mixes on some text; the original runs once for all mixes."""
        found = self.window_losses(windows_WT, replaced_sets, progress)
        return {name: sum(losses, Loss()) for name, losses in found.items()}

    def window_losses(
        self, windows_WT: Any, replaced_sets: Mapping[Any, Collection[int]], progress: Progress = quiet
    ) -> dict[Any, list[Loss]]:
        """As `quality_losses`, for each window separately."""
        windows_WT = torch.as_tensor(windows_WT)
        at_once, total, done = self._at_once(windows_WT), len(windows_WT), 0
        found_SWL = torch.zeros(len(replaced_sets), total, len(fields(Loss)), dtype=torch.float64)
        parts = windows_WT.split(at_once)
        for part in processes.own(len(parts)):
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
        joined = processes.joined(found_SWL).tolist()
        return {name: [Loss.of(row) for row in rows] for name, rows in zip(replaced_sets, joined, strict=True)}

    def _at_once(self, windows_WT: torch.Tensor) -> int:
        """Windows that run at once."""
        windows, context = windows_WT.shape
        return max(1, windows if self.most_tokens is None else self.most_tokens // context)


def _scaled(progress: Progress, before: int, part: int, total: int) -> Progress:
    """Progress of a part that begins after `before` of all `total`."""
    return lambda done, of: progress(before + part * done // max(1, of), total)
