"""Order in which attention layers are replaced, found by one round of trials and a few passes of whole sets.

    each layer alone ─► effects ─► estimated loss of a set ─► next layer ─► loss of the new set by a true pass ─► ...

The loss of a set on a text is the mean of its KL and of the rise of cross entropy on the text's own next tokens. KL has
little noise. The rise is what a perplexity goal limits. The loss on all texts is the root mean square, so the worst
text counts most (bench/EXPERIMENTS.md compares rules).

The estimate for a set S with known effects and one more layer t is loss(S) + d_S' F d_t + loss(t). It
assumes that the two changes add up. Neighbours at the top of a decoder do more harm together than that. So the best
layer by the estimate is tried with S in a true pass. If its loss turns out worse than the estimate of the next best
layer, that layer is tried too, at most TRIES of them, and the best one tried is taken. What a layer lost more than
estimated counts against it in later steps.

The layer is taken that gives the set with the least loss for the square root of the prefill work that the whole set
saves. Each layer saves the same part of a decode step, so for equally large sets this is the loss over the geometric
mean of what is saved in prefill and in decode. A shorter order is the front of a longer order.

An effect is what replaced layers change in the model's output, at judged positions of some text:

    d = h' - h                               change of the last hidden state [D], after the final norm
    a = head(h') - head(h),  p = softmax(head(h))
    KL = log E_p exp(a) - E_p a                               exact
       = 1/2 Var_p(a) + ... = 1/2 d' F d + ...                F = J' (diag p - p p') J,  J = d head / d h

For changes d_i and d_j of two layers, d_i' F d_j is the part of the KL that only both together cause. So the effects of
each layer alone estimate the KL of every set of layers, as far as the changes add up. The `pull` F d of each
layer makes d_i' F d_j cheap, also for a change d_i that is measured later.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from nbl_export.errors import NblError
from nbl_export.methods.losses import PartialReplacement, Progress, quiet
from nbl_export.model import processes
from nbl_export.model.head import divergence

__all__ = ["EVERY", "RULE", "TRIES", "Effects", "Judge", "Point", "Search"]

RULE = 2  # number of the rule in this module; another order for the same model needs another number
TRIES = 3
_NOTHING = 1e-9  # least share of the work that a set saves, and least loss


EVERY = 4  # every fourth position is judged; each position sees all positions before
_BLOCK_BYTES = 64 << 20  # of the changes of logits that are held at once


@dataclass(frozen=True)
class Point:
    """A replaced set. For each text: KL, and the rise of the cross entropy of the text's next tokens, both in nats."""

    layers: tuple[int, ...]
    kl: tuple[float, ...]
    rises: tuple[float, ...]

    @property
    def losses(self) -> tuple[float, ...]:
        """What the set loses on each text: the mean of KL and rise."""
        return tuple((kl + rise) / 2 for kl, rise in zip(self.kl, self.rises, strict=True))

    @property
    def loss(self) -> float:
        """What the set loses on all texts (`_overall`)."""
        return _overall(torch.tensor(self.losses, dtype=torch.float64))

    @property
    def increases(self) -> tuple[float, ...]:
        """Increase of perplexity on each text, as a share."""
        return tuple(math.expm1(rise) if rise < 700 else math.inf for rise in self.rises)  # NaN too

    @property
    def worst_increase(self) -> float:
        """Increase of perplexity on the worst text, as a share."""
        return max(self.increases)


class _Solo:
    """Effects of each layer alone on one text, the loss of each, and the factors that make half of d' F d its KL."""

    def __init__(self, effects: Effects) -> None:
        kl_K, rise_K = (value.mean(0, dtype=torch.float64).cpu() for value in (effects.kl_NK, effects.rise_NK))
        self.effects = effects
        self.loss = (kl_K + rise_K) / 2
        self.scale = _scale(effects)

    def beside(self, base: Effects) -> torch.Tensor:
        """What a set and each layer cost together beyond the sum of both [K]."""
        return base.gram(self.effects)[0] * _scale(base) * self.scale


def _overall(loss_P: torch.Tensor) -> float:
    """The loss on all texts: the root mean square of the loss on each; infinite if one is not finite."""
    value = float(loss_P.clamp_min(0).square().mean().sqrt())
    return max(value, _NOTHING) if math.isfinite(value) else math.inf


class Search:
    """Extends an order step by step.

    Args:
        judge: measures effects.
        steps: sets in order of replacement, each with one layer more than the one before, found with the same judge.
        saving: share of a prefill's work that replacing these layers saves.
        progress: called with trials and passes done, and the total of the round of trials.
        kept: layers that are not replaced.
    """

    def __init__(
        self,
        judge: Judge,
        steps: tuple[Point, ...],
        saving: Callable[[Sequence[int]], float],
        progress: Progress,
        kept: Sequence[int] = (),
    ) -> None:
        self._judge = judge
        self._saving = saving
        self._kept = kept
        self._effects_alone = judge.alone(progress)
        self._alone = [_Solo(part) for part in self._effects_alone.split(judge.parts)]
        if not any(math.isfinite(_overall(loss_P)) for loss_P in torch.stack([solo.loss for solo in self._alone], 1)):
            raise NblError("the map of layer 0 gives logits that are not finite; give more --calibration-tokens")
        self.steps = steps
        self._excess: dict[int, float] = {}
        self._effects = judge.together(steps[-1].layers) if steps else None

    def extend(self, length: int, progress: Progress = quiet) -> tuple[Point, ...]:
        """Take steps up to `length` of them, and return all.

        Raises:
            NblError: every further layer's map gives logits that are not finite.
        """
        while len(self.steps) < length:
            point, self._effects = self._step()
            self.steps = (*self.steps, point)
            progress(len(self.steps), length)
        return self.steps

    def _estimates(self) -> list[float]:
        """Estimated loss of the set with each layer as one more."""
        loss_PK = torch.stack([solo.loss for solo in self._alone])
        if self._effects is not None:
            parts = zip(self._alone, self._effects.split(self._judge.parts), strict=True)
            known_P1 = torch.tensor(self.steps[-1].losses, dtype=torch.float64)[:, None]
            loss_PK = known_P1 + (loss_PK + torch.stack([solo.beside(part) for solo, part in parts]))
        return [_overall(loss_P) for loss_P in loss_PK.unbind(1)]

    def _step(self) -> tuple[Point, Effects]:
        known = self.steps[-1].layers if self.steps else ()
        estimates = self._estimates()
        predicted = {
            i: self._value(loss + self._excess.get(i, 0.0), (*known, i))
            for i, loss in enumerate(estimates)
            if i not in known and i not in self._kept
        }
        ranked = sorted(predicted, key=lambda i: (predicted[i], i))  # the lower layer first on a tie
        tried: list[tuple[float, Point, Effects]] = []
        for layer, following in zip(ranked[:TRIES], [*ranked[1:], None], strict=False):
            replaced_set = (*known, layer)
            effects = self._judge.together(replaced_set) if known else self._effects_alone[layer]
            point = self._point(replaced_set, effects)
            self._excess[layer] = max(0.0, point.loss - estimates[layer])
            tried.append((self._value(point.loss, replaced_set), point, effects))
            if following is None or min(value for value, _, _ in tried) <= predicted[following]:
                break
        _, point, effects = min(tried, key=lambda t: t[0])
        if not math.isfinite(point.loss):
            raise NblError(
                f"the map of layer {point.layers[-1]} gives logits that are not finite; give more --calibration-tokens"
            )
        self._excess.pop(point.layers[-1], None)
        return point, effects

    def _value(self, loss: float, replaced_set: Sequence[int]) -> float:
        return loss / math.sqrt(max(self._saving(replaced_set), _NOTHING)) if math.isfinite(loss) else math.inf

    def _point(self, layers: tuple[int, ...], effects: Effects) -> Point:
        parts = effects.split(self._judge.parts)
        means = (
            tuple(float(value.mean(dtype=torch.float64)) for value in values)
            for values in ([part.kl_NK for part in parts], [part.rise_NK for part in parts])
        )
        return Point(layers, *means)


def _scale(effects: Effects) -> torch.Tensor:
    """Factors of changes that make half of d' F d the true KL [K]."""
    kl_K, square_K = (value.mean(0, dtype=torch.float64).cpu() for value in (effects.kl_NK, effects.square_NK))
    return (2 * kl_K / square_K.clamp_min(_NOTHING)).clamp_min(0).sqrt()


# -- effects ---------------------------------------------------------------------------------------------------


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
        """Mean of d_i' F d_j over positions, [K, K of other], in float64 on the CPU; `other` has its pull."""
        assert other.pull_NKD is not None
        ours, theirs = (v.transpose(0, 1).flatten(1) for v in (self.change_NKD, other.pull_NKD))
        return (ours @ theirs.T).double().cpu() / len(self.kl_NK)


def _judged_rows(windows_WT: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, windows_WT.shape[1] - 1, EVERY)


def _judged(states_WTD: torch.Tensor) -> torch.Tensor:
    return states_WTD[:, _judged_rows(states_WTD)].flatten(0, 1).float()


def _own(ids_WT: torch.Tensor, place_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of this process and the places of their judged positions.

    A process without a window runs the first one too, and its place is behind all others.
    """
    if mine := [*processes.rank_slice(len(ids_WT))]:
        return ids_WT[mine], place_N.view(len(ids_WT), -1)[mine].flatten()
    return ids_WT[:1], torch.full(place_N.view(len(ids_WT), -1).shape[1:], -1)


class Judge:
    """Runs mixes on selection windows and measures their effects.

    Args:
        partial: the model with the maps of all layers.
        texts: token ids [windows, context] of each text, whose contexts may differ; no map was fitted on them.
    """

    def __init__(self, partial: PartialReplacement, texts: Sequence[torch.Tensor]) -> None:
        alike = [torch.cat(list(group)) for _, group in itertools.groupby(texts, lambda text: text.shape[1])]
        self._partial = partial
        self.num_layers = partial.num_layers
        self.parts = [len(text) * len(_judged_rows(text)) for text in texts]  # judged positions of each text
        places = torch.arange(sum(self.parts)).split([ids_WT[:, _judged_rows(ids_WT)].numel() for ids_WT in alike])
        own, places = zip(*(_own(*group) for group in zip(alike, places, strict=True)), strict=True)
        self._place_N = torch.cat(places)  # of the positions that this process judges
        self._target_N = torch.cat([ids_WT[:, _judged_rows(ids_WT) + 1].flatten() for ids_WT in own])
        self._runs = [partial.runs(ids_WT, again=True) for ids_WT in own]

    def _joined(self, own: torch.Tensor) -> torch.Tensor:
        """Values at all judged positions, of those of each process."""
        if processes.count() == 1:
            return own
        all_positions = own.new_zeros(sum(self.parts) + 1, *own.shape[1:])
        all_positions[self._place_N] = own
        return processes.all_reduce_sum(all_positions[:-1])

    def alone(self, progress: Progress) -> Effects:
        """The effects of each layer alone (K: all layers)."""
        return self._effects(self._changes_of([(i,) for i in range(self.num_layers)], progress), pulled=True)

    def together(self, replaced_set: Collection[int]) -> Effects:
        """The effects of a mix (K = 1), without its pull."""
        return self._effects(self._changes_of([replaced_set]), pulled=False)

    def _changes_of(self, replaced_sets: Sequence[Collection[int]], progress: Progress = quiet) -> torch.Tensor:
        """How each mix changes the judged last hidden states [N, K, D]."""
        found: list[torch.Tensor] = []

        def of_all(done: int, total: int) -> None:
            progress(len(found) * total + done, len(self._runs) * total)

        for runs in self._runs:
            found.append(torch.stack([_judged(last_WTD) for last_WTD in runs.last(replaced_sets, of_all)], 1))
        return torch.cat(found).sub_(self._original_ND[:, None])

    @functools.cached_property
    def _original_ND(self) -> torch.Tensor:
        return torch.cat([_judged(runs.original) for runs in self._runs])

    @torch.no_grad()
    def _effects(self, change_NKD: torch.Tensor, *, pulled: bool) -> Effects:
        positions, count, _ = change_NKD.shape
        rows = max(1, _BLOCK_BYTES // (4 * count * self._partial.head.size))
        found = [self._measure(part_N, change_NKD[part_N], pulled) for part_N in torch.arange(positions).split(rows)]
        values = (change_NKD, *(torch.cat(values) for values in zip(*found, strict=True)))
        return Effects(*(self._joined(value) for value in values))

    def _measure(self, part_N: torch.Tensor, change_NKD: torch.Tensor, pulled: bool) -> tuple[torch.Tensor, ...]:
        """KL, rise of the loss, variance and, if wanted, pull at some positions."""
        head = self._partial.head
        base_NV = head.near_logits(self._original_ND[part_N])
        share_NV = base_NV.softmax(1)
        typed_NKV = head.changes(base_NV, change_NKD)
        apart_NKV = typed_NKV.float()
        mean_NK1 = apart_NKV @ share_NV[..., None]
        square_NK1 = apart_NKV.square() @ share_NV[..., None]
        pull: tuple[torch.Tensor, ...] = ()
        if pulled:
            typed_N1V = share_NV[:, None].to(typed_NKV.dtype)
            common_N1D = head.pull(base_NV, typed_N1V)
            pull = (head.pull(base_NV, typed_NKV * typed_N1V) - mean_NK1 * common_N1D,)
        variance_NK = (square_NK1 - mean_NK1.square())[..., 0]
        return *divergence(share_NV, apart_NKV, self._target_N[part_N].to(share_NV.device)), variance_NK, *pull
