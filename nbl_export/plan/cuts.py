"""The cut of a decoder: the layer from which keys of a prompt's far tokens are predicted (`mixers.predicted`).

    cuts, by halves with the fewest near tokens ─► the lowest that is foreseen within the limits
    candidates (cut, near), most of a prompt saved first
      ─► foreseen: the increase of perplexity on the choosing texts, each within its limit
      ─► decided: the upper end of the 95% interval on the deciding texts, at most the limit ─► the first that holds

A higher cut loses less, and so do more near tokens: what is foreseen of one candidate speaks for others.

The texts are ordinary rows of both texts, and the answers from far back (`text.far`) in these rows and in passages that
occur twice. A layer that copies above the cut fails there first, and ordinary text hardly shows it. Each row counts as
much as another one, however many answers it has. Every position is judged with its near keys its own and its far keys
predicted, which is near what is served (`model.cut`). Candidates are tested in a fixed order until the first one
passes. Each failure before it adds the error rate of one more test at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.errors import NblError
from nbl_export.model import processes
from nbl_export.plan.inputs import Maps, Task, Texts
from nbl_export.records.inputs import Lazy
from nbl_export.records.plan import Plan
from nbl_export.records.quality import FAR_SHARE, far_ends, far_row, loss_row, spoken_far, spoken_increase
from nbl_export.text.far import FEWEST, SHORT, contexts, is_far
from nbl_export.text.windows import repeated

if TYPE_CHECKING:
    import torch

    from nbl_export.mixers.base import Mixer
    from nbl_export.model.switched import Loss, SwitchedModel

__all__ = ["LENGTH", "CutInputs", "choose_cut", "joined"]

LENGTH = 1024  # tokens of a row: far keys are most of what its later tokens read
_ROWS = 16  # that decide: of each text, and of passages
_TWICE_ROWS = 4
_EVERY = 2  # every second position is foreseen
_HOPELESS = 2.0  # times the limit: such a cut is not tried with more near tokens, which halve a loss or less
_PROMPTS = (512, 2048)  # tokens of the prompts whose saved work is weighed
Say = Callable[[str], None]


@dataclass(frozen=True)
class CutInputs:
    """What the choice of a cut follows from.

    Attributes:
        cuts: candidates; one if it is named, and then nothing is tested.
        nears: numbers of tokens at the end of a prompt that climb.
        share: most increase of perplexity. asked: its text, None for the default.
        maps: a cut and a number of near tokens -> the maps of all layers from the cut up.
        mixes: maps and their tap -> the torch model, in which these maps can replace attention.
        choosing, deciding: rows of each text.
        saved: share of the arithmetic of a prompt of some tokens that maps save.
        speedup: modelled speed-ups of some maps. setting: what they are modelled for.
    """

    num_layers: int
    cuts: tuple[int, ...]
    nears: tuple[int, ...]
    named: bool
    share: float
    asked: str | None
    length: int
    maps: Lazy[Callable[[int, int], Maps]]
    mixes: Lazy[Callable[[Maps, str], Any]]
    choosing: Lazy[Texts]
    deciding: Lazy[Texts]
    saved: Lazy[Callable[[Maps, int], float]]
    speedup: Lazy[Callable[[Maps], Any]]
    setting: Lazy[Mapping[str, Any]]


def joined(rows_WT: Any, length: int) -> torch.Tensor:
    """Consecutive rows joined to rows of `length` tokens, the rest left out; the rows if too few, or longer."""
    import torch

    if rows_WT.shape[1] >= length:
        return torch.as_tensor(rows_WT)
    ids = torch.as_tensor(rows_WT).flatten()
    count = len(ids) // length
    return ids[: count * length].view(count, length) if count else torch.as_tensor(rows_WT)


def _spread(rows_WT: torch.Tensor, most: int) -> torch.Tensor:
    """At most so many rows, from all parts of the text."""
    return rows_WT[:: max(1, len(rows_WT) // most)][:most]


def choose_cut(inputs: CutInputs, task: Task, say: Say) -> tuple[Plan, dict[int, Mixer], dict[str, Any]]:
    """The plan of the cut that saves most of a prompt within the limit, its maps, and further facts for the manifest.

    Raises:
        NblError: no candidate is within the limit.
    """
    if inputs.named:
        cut = inputs.cuts[0]
        near = inputs.nears[0]
        say(_spoken(cut, near, inputs.num_layers))
        return _planned(inputs, cut, near, {})
    path: list[dict[str, Any]] = []
    judge = _Judge(inputs, task)
    foreseen = _Foreseen(inputs, judge)
    foreseen.halve()
    for cut, near in _by_saving(inputs):
        if not foreseen.holds(cut, near):
            continue
        chosen = inputs.maps.value(cut, near)
        rows, far = judge.decide(chosen)
        within = all(_upper(row) <= inputs.share for row in rows)
        within &= far is None or far_ends(far)[1] <= FAR_SHARE * inputs.share
        step = {"layers": len(chosen), "layer": cut, "near": near, "within": within}
        path.append({**step, "quality_losses": rows, "far": far})
        if within:
            for line in _lines(inputs, path):
                say(line)
            curve = {"texts": foreseen.texts, **inputs.setting.value, "points": foreseen.points}
            goal = {"max_perplexity_increase": inputs.asked or f"{inputs.share:.0%}", "default": inputs.asked is None}
            return _planned(inputs, cut, near, {"goal": {**goal, "path": path[::-1]}, "curve": curve})
    raise NblError(_unreachable(inputs, foreseen.points))


def _planned(
    inputs: CutInputs, cut: int, near: int, facts: dict[str, Any]
) -> tuple[Plan, dict[int, Mixer], dict[str, Any]]:
    maps = dict(inputs.maps.value(cut, near))
    plan = Plan.of(inputs.num_layers, {i: mixer.kind for i, mixer in maps.items()}, select="cut")
    return plan, maps, {**facts, "cut": {"layer": cut, "near": near}}


def _by_saving(inputs: CutInputs) -> list[tuple[int, int]]:
    """Candidates, most of a prompt saved first."""
    saved = inputs.saved.value
    maps = inputs.maps.value
    pairs = [(cut, near) for cut in inputs.cuts for near in inputs.nears]
    worth = {(c, n): sum(saved(maps(c, n), tokens) for tokens in _PROMPTS) for c, n in pairs}
    return sorted(pairs, key=lambda pair: -worth[pair])


class _Foreseen:
    """Candidates whose increase on the choosing texts is known, or follows from others' increases."""

    def __init__(self, inputs: CutInputs, judge: _Judge) -> None:
        self._inputs = inputs
        self._judge = judge
        self.texts: list[str] = []
        self._worst: dict[tuple[int, int], float] = {}  # the largest increase of a text over the limit
        self._points: dict[tuple[int, int], dict[str, Any]] = {}

    @property
    def points(self) -> list[dict[str, Any]]:
        """Points of the curve, the highest cut first."""
        return [self._points[key] for key in sorted(self._points, reverse=True)]

    def halve(self) -> None:
        """Find the lowest cut that holds with the fewest near tokens."""
        cuts = self._inputs.cuts
        near = min(self._inputs.nears)
        low = 0
        high = len(cuts)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._measured(cuts[middle], near) <= 1 else (middle + 1, high)

    def holds(self, cut: int, near: int) -> bool:
        """Whether a candidate is foreseen within the limits; it is measured only if no other one tells."""
        for (c, n), worst in self._worst.items():
            if c >= cut and (worst > _HOPELESS or (n >= near and worst > 1)):
                return False
            if c <= cut and n <= near and worst <= 1:
                return True
        return self._measured(cut, near) <= 1

    def _measured(self, cut: int, near: int) -> float:
        maps = self._inputs.maps.value(cut, near)
        losses, far = self._judge.foresee(maps)
        self._points[cut, near] = _point(self._inputs, maps, losses, far)
        self.texts = list(losses)
        parts = [*(increase for increase, _ in losses.values()), (far or 0.0) / FAR_SHARE]
        self._worst[cut, near] = max(parts) / self._inputs.share
        return self._worst[cut, near]


@dataclass
class _Row:
    """A row of a text.

    Attributes:
        text: its name; None if answers from far back alone count, as in a passage that occurs twice.
        begin: the first judged position.
        run: of the original, which serves all cuts; None runs it again for each.
        far: positions of the answers from far back, and what they gain by the whole text, once they are known.
    """

    text: str | None
    ids_T: torch.Tensor
    begin: int = 0
    run: Any = None
    far: tuple[torch.Tensor, torch.Tensor] | None = None


class _Judge:
    """Losses of cuts on the choosing and the deciding texts, and what is lost of their answers from far back."""

    def __init__(self, inputs: CutInputs, task: Task) -> None:
        self._inputs = inputs
        self._task = task

    def foresee(self, maps: Maps) -> tuple[dict[str, tuple[float, float]], float | None]:
        """Increase of perplexity and KL on each choosing text, and the lost share of answers."""
        losses, far = self._judged(maps, self._choosing, _EVERY)
        rows = [loss_row(name, found) for name, found in losses.items()]
        increases = {row["text"]: (_finite(row["increase"]), _finite(row["kl"])) for row in rows}
        return increases, None if far is None else _finite(far["lost"])

    def decide(self, maps: Maps) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """A row of each deciding text, and one of the answers from far back, with intervals."""
        losses, far = self._judged(maps, self._deciding, 1)
        return [loss_row(name, found) for name, found in losses.items()], far

    def _judged(
        self, maps: Maps, rows: Sequence[_Row], every: int
    ) -> tuple[dict[str, list[Loss]], dict[str, Any] | None]:
        """The losses of the rows of each text, and the answers from far back; `every`: distance of positions."""
        import torch

        from nbl_export.model.switched import Loss

        mixes: SwitchedModel = self._inputs.mixes.value(maps, "residual")
        table = torch.zeros(len(rows), 8, dtype=torch.float64)  # a row's loss, and that of its answers with their gain
        with self._task(f"a cut at layer {min(maps)}") as progress:
            for k in processes.own(len(rows)):
                row = rows[k]
                run = mixes.runs(row.ids_T[None], again=False) if row.run is None else row.run.of(mixes)
                (last_WTD,) = run.last([tuple(maps)])
                given = row.ids_T, run.original[0], {0: last_WTD[0]}
                each: list[torch.Tensor] = []  # the original's losses
                if row.text is not None:
                    ordinary = torch.arange(0, len(row.ids_T) - 1, every)
                    loss = mixes.losses(*given, ordinary, each)[0]
                    table[k, :4] = torch.tensor(astuple(loss), dtype=torch.float64)
                known_N = torch.cat(each) if each and every == 1 else None
                positions_N, gain_N = self._far(row, mixes, run.original[0], known_N)
                if len(positions_N) >= FEWEST:
                    loss = mixes.losses(*given, positions_N)[0]
                    seen = (loss.positions, loss.original_sum, loss.nbl_sum, gain_N.sum().item())
                    table[k, 4:] = torch.tensor(seen, dtype=torch.float64)
                progress(k + 1, len(rows))
        found: dict[str, list[Loss]] = {}
        answers = []
        for row, values in zip(rows, processes.joined(table).tolist(), strict=True):
            if row.text is not None:
                found.setdefault(row.text, []).append(Loss.of(values[:4]))
            if values[4]:
                answers.append((int(values[4]), *values[5:]))
        return found, far_row(answers)

    def _far(
        self, row: _Row, mixes: SwitchedModel, original_TD: torch.Tensor, known_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the answers from far back in a row, and what they gain by the whole text.

        known_N: the original's losses at all positions, if they were computed before.
        """
        import torch

        if row.far is None:
            begin = max(row.begin, SHORT - 1)
            end = len(row.ids_T) - 1
            if end <= begin:
                return torch.arange(0), torch.zeros(0)
            index = torch.from_numpy(contexts(begin, end))
            last_ND = mixes.runs(row.ids_T[index], again=False).original[:, SHORT - 1 :].flatten(0, 1)
            short = last_ND[: end - begin]
            target_N = row.ids_T[begin + 1 :]
            whole_N = mixes.cross_entropies(original_TD[begin:end], target_N) if known_N is None else known_N[begin:end]
            gain = mixes.cross_entropies(short, target_N) - whole_N
            far = is_far(gain)
            row.far = begin + far.nonzero()[:, 0], gain[far]
        return row.far

    @functools.cached_property
    def _choosing(self) -> list[_Row]:
        """Few rows, and runs that keep what all cuts have in common."""
        (*texts, (_, twice_WT)), length = self._inputs.choosing.value, self._inputs.length
        rows = [_Row(name, ids_T) for name, ids_WT in texts for ids_T in joined(ids_WT, length)]
        rows += [_Row(None, ids_T, len(ids_T) // 2) for ids_T in twice_WT]
        original: SwitchedModel = self._inputs.mixes.value({}, "residual")
        for row in rows:
            row.run = original.runs(row.ids_T[None], again=True)
        return rows

    @functools.cached_property
    def _deciding(self) -> list[_Row]:
        texts = self._inputs.deciding.value
        length = self._inputs.length
        rows = [_Row(name, ids_T) for name, ids_WT in texts for ids_T in _spread(joined(ids_WT, length), _ROWS)]
        parts = [repeated(part, len(part))[0] for part in _spread(joined(texts[0][1], 2 * length), _TWICE_ROWS)]
        return [*rows, *(_Row(None, part, len(part) // 2) for part in parts)]


def _point(
    inputs: CutInputs, maps: Maps, losses: Mapping[str, tuple[float, float]], far: float | None
) -> dict[str, Any]:
    """A point of the curve."""
    speed = inputs.speedup.value(maps)
    return {
        "layers": len(maps),
        "replaced_layers": sorted(maps),
        "near": next(iter(maps.values())).reads[0].tokens,
        "kl": [kl for _, kl in losses.values()],
        "increases": [increase for increase, _ in losses.values()],
        "far": far,
        "prefill": speed.prefill,
        "decode": speed.decode,
    }


def _finite(value: float | None) -> float:
    return math.inf if value is None else value


def _upper(row: Mapping[str, Any]) -> float:
    """The upper end of the increase of a row; infinite without an interval."""
    ends: Sequence[float] | None = row["increase_interval"]
    return math.inf if row["increase"] is None or not ends else ends[1]


def _spoken(cut: int, near: int, num_layers: int) -> str:
    return f"keys of layers {cut} to {num_layers - 1} are predicted, but those of a prompt's last {near} tokens"


def _lines(inputs: CutInputs, path: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What was decided, for the user."""
    best = path[-1]
    yield _spoken(best["layer"], best["near"], inputs.num_layers)
    for row in best["quality_losses"]:
        yield f"perplexity {spoken_increase(row)} on {row['text']}"
    if best["far"] is not None:
        yield spoken_far(best["far"])
    for step in path[:-1]:
        worst = max(step["quality_losses"], key=_upper)
        said = f"{spoken_increase(worst)} on {worst['text']}"
        if _upper(worst) <= inputs.share:
            said = spoken_far(step["far"])
        yield f"a cut at {step['layer']} with {step['near']} near tokens: {said}"


def _unreachable(inputs: CutInputs, points: Sequence[Mapping[str, Any]]) -> str:
    least = min(points, key=lambda point: max(*point["increases"], (point["far"] or 0.0) / FAR_SHARE))
    flag = f"--max-perplexity-increase {inputs.asked}" if inputs.asked else f"the default limit of {inputs.share:.0%}"
    return (
        f"{flag} cannot be met: of the cuts that were tried, one at layer {min(least['replaced_layers'])} loses least, "
        f"{max(least['increases']):+.1%} of perplexity and {least['far'] or 0:.0%} of answers from far back; "
        "allow more, name a cut (--cut), or replace layers (--cut none)"
    )
