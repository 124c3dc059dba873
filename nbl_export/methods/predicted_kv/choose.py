"""The exit layer of a decoder: the layer from which a prompt's skipped tokens have predicted KV
(`methods.predicted_kv.maps`).

    exit layers, by halves with the fewest recent tokens ─► the lowest that is estimated within the limits
    candidates (exit layer, recent tokens), most of a prompt saved first
      ─► estimated: the increase of perplexity on the selection texts, each within its limit
      ─► decided: the upper end of the 95% interval on the validation texts, at most the limit ─► the first that holds

A higher exit layer loses less, and so do more recent tokens: the estimate of one candidate speaks for others.

The texts are ordinary rows of both texts, passages that occur twice, and retrieval items (`text.retrieval`). The
long-range tokens (`text.long_range`) of each have a figure of their own: a layer that copies above the exit layer fails
there first, and ordinary text hardly shows it. A row of a text counts as much as another one, however many such tokens
it has. Of items, the tokens of answers count. A kind of items whose answers the original does not find is not judged
(`records.quality.retrieval_row`).

At every position, recent tokens have their own keys and values, and skipped tokens predicted ones, which is close to
what is served (`methods.predicted_kv.torch_layers`). Candidates are tested in a fixed order until the first one passes.
Each failure before it adds the error rate of one more test at most.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError
from nbl_export.methods.base import Choice, ChoiceInputs, Maps, Mixer, Say, Task
from nbl_export.methods.choose import lines, point, step, unreachable
from nbl_export.methods.predicted_kv.candidates import ExitCandidates
from nbl_export.model import processes
from nbl_export.records.plan import Plan
from nbl_export.records.quality import LONG_RANGE_SHARE, long_range_row, loss_row, retrieval_row
from nbl_export.text.long_range import FEWEST, SHORT, contexts, is_long_range
from nbl_export.text.parts import Texts
from nbl_export.text.windows import TWICE, joined, repeated

if TYPE_CHECKING:
    import torch

    from nbl_export.methods.losses import Loss, PartialReplacement

__all__ = ["choose_exit"]

_ROWS = 16  # that decide: of each text, and of passages
_TWICE_ROWS = 4
_EVERY = 2  # every second position is estimated
_HOPELESS = 2.0  # times the limit: such an exit layer is not tried with more recent tokens, which halve a loss or less
_PROMPTS = (512, 2048)  # tokens of the prompts whose saved work is weighed
Fit = Callable[[int], Mapping[int, Mixer]]


def _spread(rows_WT: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, from all parts of the text."""
    return rows_WT[:: max(1, len(rows_WT) // most)][:most]


class _Fitted:
    """Maps of exit layers, each fitted once."""

    def __init__(self, fit: Fit) -> None:
        self._fit = functools.cache(fit)

    def __call__(self, exit_layer: int, recent_tokens: int) -> Maps:
        """The maps of all layers from an exit layer up."""
        found: Mapping[int, Any] = self._fit(exit_layer)
        return {i: dataclasses.replace(mixer, recent_tokens=recent_tokens) for i, mixer in found.items()}


def choose_exit(inputs: ChoiceInputs, fit: Fit, task: Task, say: Say) -> Choice:
    """The exit layer that saves most of a prompt within the limit.

    Args:
        fit: an exit layer -> the maps of all layers from there up.

    Raises:
        NblError: no candidate is within the limit.
    """
    asked: ExitCandidates = inputs.candidates
    fitted = _Fitted(fit)

    def chosen(exit_layer: int, recent_tokens: int, facts: dict[str, Any]) -> Choice:
        maps = dict(fitted(exit_layer, recent_tokens))
        plan = Plan.of(inputs.num_layers, {i: mixer.kind for i, mixer in maps.items()}, select="exit")
        return Choice(plan, maps, facts)

    if asked.named:
        exit_layer = asked.exits[0]
        recent_tokens = asked.recent_choices[0]
        say(_described(exit_layer, recent_tokens))
        return chosen(exit_layer, recent_tokens, {})
    failed: list[dict[str, Any]] = []
    judge = _Judge(inputs, task)
    estimates = _Estimates(inputs, fitted, judge)
    estimates.halve()
    for exit_layer, recent_tokens in _by_saving(inputs, fitted):
        if not estimates.holds(exit_layer, recent_tokens):
            continue
        maps = fitted(exit_layer, recent_tokens)
        losses, long_range, items = judge.decide(maps)
        facts = {"layers": len(maps), "layer": exit_layer, "recent_tokens": recent_tokens}
        tested = step(facts, losses, inputs.limit.share, long_range, items)
        if not tested["within"]:
            failed.append(tested)
            continue
        others = [(_described(other["layer"], other["recent_tokens"]), other) for other in failed]
        for line in lines(inputs.limit, (_described(exit_layer, recent_tokens), tested), others):
            say(line)
        curve = {"texts": estimates.texts, **inputs.setting.value, "points": estimates.points}
        goal = {**inputs.limit.facts, "path": [tested, *failed[::-1]]}
        return chosen(exit_layer, recent_tokens, {"goal": goal, "curve": curve})
    least = min(estimates.points, key=_worst)
    what = (
        f"of the exit layers that were tried, {min(least['replaced_layers'])} loses least, "
        f"{max(least['increases']):+.1%} of perplexity and {least['long_range'] or 0:.0%} of long-range tokens"
    )
    raise unreachable(inputs.limit, what, "name an exit layer (--exit-layer N), or replace layers (--exit-layer none)")


def _by_saving(inputs: ChoiceInputs, fitted: _Fitted) -> list[tuple[int, int]]:
    """Candidates, most of a prompt saved first."""
    asked: ExitCandidates = inputs.candidates
    saved = inputs.saved.value
    pairs = [(exit_layer, recent_tokens) for exit_layer in asked.exits for recent_tokens in asked.recent_choices]
    worth = {pair: sum(saved(fitted(*pair), tokens) for tokens in _PROMPTS) for pair in pairs}
    return sorted(pairs, key=lambda pair: -worth[pair])


def _worst(found: Mapping[str, Any]) -> float:
    """The largest loss of a point of the curve, as an increase of perplexity."""
    return max(*found["increases"], (found["long_range"] or 0.0) / LONG_RANGE_SHARE)


def _described(exit_layer: int, recent_tokens: int) -> str:
    return f"exit layer {exit_layer}, {recent_tokens} recent tokens"


class _Estimates:
    """Candidates whose increase on the selection texts is known, or follows from others' increases."""

    def __init__(self, inputs: ChoiceInputs, fitted: _Fitted, judge: _Judge) -> None:
        self._inputs = inputs
        self._asked: ExitCandidates = inputs.candidates
        self._fitted = fitted
        self._judge = judge
        self.texts: list[str] = []
        self._worst: dict[tuple[int, int], float] = {}  # the largest increase of a text over the limit
        self._points: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def points(self) -> list[dict[str, Any]]:
        """Points of the curve, the highest exit layer first."""
        return [self._points[key] for key in sorted(self._points, reverse=True)]

    def halve(self) -> None:
        """Find the lowest exit layer that holds with the fewest recent tokens."""
        exits = self._asked.exits
        recent_tokens = min(self._asked.recent_choices)
        low = 0
        high = len(exits)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._measured(exits[middle], recent_tokens) <= 1 else (middle + 1, high)

    def holds(self, exit_layer: int, recent_tokens: int) -> bool:
        """Whether a candidate is estimated within the limits; it is measured only if no other one tells."""
        for (c, n), worst in self._worst.items():
            if c >= exit_layer and (worst > _HOPELESS or (n >= recent_tokens and worst > 1)):
                return False
            if c <= exit_layer and n <= recent_tokens and worst <= 1:
                return True
        return self._measured(exit_layer, recent_tokens) <= 1

    def _measured(self, exit_layer: int, recent_tokens: int) -> float:
        maps = self._fitted(exit_layer, recent_tokens)
        losses, long_range = self._judge.estimate(maps)
        kl = [kl for _, kl in losses.values()]
        increases = [increase for increase, _ in losses.values()]
        facts = {"recent_tokens": recent_tokens, "long_range": long_range}
        found = point(maps, self._inputs.speedup.value(maps), kl, increases, **facts)
        self._points[exit_layer, recent_tokens] = found
        self.texts = list(losses)
        self._worst[exit_layer, recent_tokens] = _worst(found) / self._inputs.limit.share
        return self._worst[exit_layer, recent_tokens]


@dataclass
class _Row:
    """A row of a text.

    Attributes:
        text: its name.
        alone_N: positions of the long-range tokens that alone count, as in a passage that occurs twice; None if all
            tokens count.
        item: whether it holds retrieval items.
        run: of the original, which serves all exit layers; None runs it again for each.
        long_range: positions of the long-range tokens, and what they gain by the whole text, once they are known.
    """

    text: str
    ids_T: torch.Tensor
    alone_N: torch.Tensor | None = None
    item: bool = False
    run: Any = None
    long_range: tuple[torch.Tensor, torch.Tensor] | None = None


# Losses of each text, a row of each text's long-range tokens, and a row of each kind of retrieval items.
_Judged = tuple[dict[str, "list[Loss]"], list[dict[str, Any]], list[dict[str, Any]]]


class _Judge:
    """Losses of exit layers on the selection and the validation texts, and what is lost of their long-range tokens."""

    def __init__(self, inputs: ChoiceInputs, task: Task) -> None:
        self._inputs = inputs
        self._length = inputs.candidates.collected.length
        self._task = task

    def estimate(self, maps: Maps) -> tuple[dict[str, tuple[float, float]], float | None]:
        """Increase of perplexity and KL on each selection text, and the largest lost share of long-range tokens."""
        losses, long_range, items = self._judged(maps, self._selection, _EVERY)
        rows = [loss_row(name, found) for name, found in losses.items()]
        increases = {row["text"]: (_finite(row["increase"]), _finite(row["kl"])) for row in rows}
        deciding = [*long_range, *(row for row in items if row["judged"])]
        return increases, max((_finite(row["lost"]) for row in deciding), default=None)

    def decide(self, maps: Maps) -> _Judged:
        """Figures of the validation texts and items, with intervals."""
        return self._judged(maps, self._validation, 1)

    def _judged(self, maps: Maps, rows: Sequence[_Row], every: int) -> _Judged:
        """Figures of the rows of each text and each kind of items; `every`: distance of positions."""
        import torch

        from nbl_export.methods.losses import Loss

        partial: PartialReplacement = self._inputs.partial.value(maps, "residual")
        table = torch.zeros(
            len(rows), 8, dtype=torch.float64
        )  # a row's loss, and that of its long-range tokens with their gain
        with self._task(f"an exit layer at layer {min(maps)}") as progress:
            for k in processes.rank_slice(len(rows)):
                row = rows[k]
                run = partial.runs(row.ids_T[None], again=False) if row.run is None else row.run.of(partial)
                (last_WTD,) = run.last([tuple(maps)])
                given = row.ids_T, run.original[0], {0: last_WTD[0]}
                each: list[torch.Tensor] = []  # the original's losses
                if row.alone_N is None:
                    ordinary = torch.arange(0, len(row.ids_T) - 1, every)
                    loss = partial.losses(*given, ordinary, each)[0]
                    table[k, :4] = torch.tensor(astuple(loss), dtype=torch.float64)
                known_N = torch.cat(each) if each and every == 1 else None
                positions_N, gain_N = self._long_range(row, partial, run.original[0], known_N)
                if len(positions_N) >= FEWEST:
                    loss = partial.losses(*given, positions_N)[0]
                    seen = (loss.positions, loss.original_sum, loss.nbl_sum, gain_N.sum().item())
                    table[k, 4:] = torch.tensor(seen, dtype=torch.float64)
                progress(k + 1, len(rows))
        found: dict[str, list[Loss]] = {}
        texts: dict[str, list[tuple[int, float, float, float]]] = {}
        items: dict[str, list[tuple[int, float, float, float]]] = {}
        for row, values in zip(rows, processes.all_reduce_sum(table).tolist(), strict=True):
            if not math.isfinite(values[2]):  # `Loss.original_sum`
                raise NblError("the original's logits hold NaN or infinity; check the checkpoint's weights")
            if row.alone_N is None:
                found.setdefault(row.text, []).append(Loss.of(values[:4]))
            passages = (items if row.item else texts).setdefault(row.text, [])
            if values[4]:
                passages.append((int(values[4]), *values[5:]))
        long_range = [long_range_row(name, passages) for name, passages in texts.items() if passages]
        return found, long_range, [retrieval_row(name, passages) for name, passages in items.items()]

    def _long_range(
        self, row: _Row, partial: PartialReplacement, original_TD: torch.Tensor, known_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the long-range tokens in a row, and what they gain by the whole text.

        known_N: the original's losses at all positions, if they were computed before.
        """
        import torch

        if row.long_range is None:
            judged_N = torch.arange(len(row.ids_T) - 1) if row.alone_N is None else row.alone_N
            judged_N = judged_N[judged_N >= SHORT - 1]
            if not len(judged_N):
                return judged_N, torch.zeros(0)
            begin = int(judged_N[0])
            end = int(judged_N[-1]) + 1
            index = torch.from_numpy(contexts(begin, end))
            last_ND = partial.runs(row.ids_T[index], again=False).original[:, SHORT - 1 :].flatten(0, 1)
            short = last_ND[: end - begin]
            target_N = row.ids_T[begin + 1 : end + 1]
            whole_N = (
                partial.cross_entropies(original_TD[begin:end], target_N) if known_N is None else known_N[begin:end]
            )
            gain_N = (partial.cross_entropies(short, target_N) - whole_N)[judged_N - begin]
            long_range_N = is_long_range(gain_N)
            row.long_range = judged_N[long_range_N], gain_N[long_range_N]
        return row.long_range

    @functools.cached_property
    def _selection(self) -> list[_Row]:
        """Few rows, and runs that keep what all exit layers have in common."""
        (*texts, (_, twice_WT)), length = self._inputs.selection.value, self._length
        rows = [_Row(name, ids_T) for name, ids_WT in texts for ids_T in joined(ids_WT, length)]
        rows += [*map(_passages, twice_WT), *_items(self._inputs.selection_items.value)]
        original: PartialReplacement = self._inputs.partial.value({}, "residual")
        for row in rows:
            row.run = original.runs(row.ids_T[None], again=True)
        return rows

    @functools.cached_property
    def _validation(self) -> list[_Row]:
        texts = self._inputs.validation.value
        length = self._length
        rows = [_Row(name, ids_T) for name, ids_WT in texts for ids_T in _spread(joined(ids_WT, length), _ROWS)]
        parts = [repeated(part, len(part))[0] for part in _spread(joined(texts[0][1], 2 * length), _TWICE_ROWS)]
        return [*rows, *map(_passages, parts), *_items(self._inputs.validation_items.value)]


def _passages(ids_T: torch.Tensor) -> _Row:
    """A row of passages, each of which occurs in the second half again."""
    import torch

    return _Row(TWICE, ids_T, torch.arange(len(ids_T) // 2, len(ids_T) - 1))


def _items(texts: Texts) -> list[_Row]:
    """Rows of retrieval items; a token is predicted at the position before it."""
    rows = [(name, ids_T, answers_T) for name, rows in texts for ids_T, answers_T in rows]
    return [_Row(name, ids_T, answers_T.nonzero()[:, 0] - 1, item=True) for name, ids_T, answers_T in rows]


def _finite(value: float | None) -> float:
    return math.inf if value is None else value
