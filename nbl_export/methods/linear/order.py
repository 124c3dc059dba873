"""Scores, order and maps of a decoder's layers, each computed at first use.

An order by the model's output uses held-back text: no map is fitted on it, and no figure of the report comes from it
(`text.windows`). Half of this text is the second text, which nobody calibrates on. The calibration text alone does
not show what upper layers do on other text. With this text alone, SmolLM2's layer 24 was replaced early, at twice the
quality loss on WikiText (bench/EXPERIMENTS.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from nbl_export.files import key_of
from nbl_export.methods.base import ChoiceInputs, Mixer, Task
from nbl_export.methods.choose import point
from nbl_export.methods.linear.collect import read_sums
from nbl_export.methods.linear.greedy import EVERY, RULE, Judge, Point, Search
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.lmmse import Moments, fit, score
from nbl_export.methods.losses import PartialReplacement
from nbl_export.records.from_json import read_record
from nbl_export.records.inputs import identity_of
from nbl_export.records.plan import LayerScore, Plan

__all__ = ["Selection", "plan_of", "quiet", "ranked"]

_WEIGHED_TOKENS = 512  # of the prefill whose saved arithmetic is weighed, independent of --prompt-tokens


@contextlib.contextmanager
def quiet(_title: str) -> Iterator[Callable[[int, int], None]]:
    """A task whose progress nobody sees."""
    yield lambda _done, _total: None


class Selection:
    """Scores, order and maps of the layers of one decoder.

    Args:
        recorded: `facts` of an earlier selection; used if it was made from the same inputs.
    """

    def __init__(self, inputs: ChoiceInputs, task: Task = quiet, recorded: Mapping[str, Any] | None = None) -> None:
        self.inputs = inputs
        self.asked = inputs.candidates
        self._task = task
        self._found = recorded
        self._steps: tuple[Point, ...] = ()
        self._names: list[str] = []  # of the texts that gave the order
        self._maps: dict[int, Mixer] = {}

    @functools.cached_property
    def scores(self) -> tuple[LayerScore, ...]:
        """Scores of all layers: bounds at the residual tap for every tap, errors of the chosen one."""
        found = []
        for i in range(self.inputs.num_layers):
            scored = score(self._moments(i, "residual"), i)
            if self.asked.tap != "residual":
                own = score(self._moments(i, self.asked.tap), i, bias=self.asked.bias)
                scored = dataclasses.replace(own, bound=scored.bound)
            found.append(scored)
        return tuple(found)

    def _moments(self, layer: int, tap: str) -> Moments:
        return read_sums(self.inputs.sums.value, layer, tap).moments()

    def maps_of(self, layers: Collection[int]) -> dict[int, Mixer]:
        """The maps of some layers; the moments of one layer at a time are in memory."""
        self._maps |= {i: self._fit(i) for i in layers if i not in self._maps}
        return {i: self._maps[i] for i in layers}

    def _fit(self, layer: int) -> Linear:
        moments = self._moments(layer, self.asked.tap)
        if self.asked.dropped:
            return Linear.zeros(len(moments.y_sum))
        return Linear(*fit(moments, layer, bias=self.asked.bias))

    @functools.cached_property
    def partial(self) -> PartialReplacement:
        """The torch model, in which any set of layers can be replaced."""
        return self.inputs.partial.value(self._all_maps, self.asked.tap)

    # -- order -------------------------------------------------------------------------------------------------

    @property
    def judges(self) -> bool:
        """Whether the model's output gives the order."""
        return self.asked.select == "efficient"

    def order(self, count: int) -> tuple[int, ...]:
        """The first `count` layers to replace; a smaller count gives a prefix of a larger count's layers."""
        if not count:
            return ()
        if not self.judges:
            return tuple(i for i in ranked(self.scores) if i not in self.asked.kept)[:count]
        return self._extended(count)[count - 1].layers

    def expected_count(self, increase: float) -> int:
        """The most layers whose increase of perplexity on the selection windows is at most `increase` on every text.

        0 if the model's output does not give the order.
        """
        count = 0
        while self.judges and count < self.inputs.num_layers - 1:
            if self._extended(count + 1)[count].worst_increase > increase:
                break
            count += 1
        return count

    def _extended(self, count: int) -> tuple[Point, ...]:
        self._steps = self._steps or self._recorded()
        if len(self._steps) < count:
            search = self._search
            with self._task("sets of layers") as progress:
                self._steps = search.extend(count, progress)
        return self._steps

    @functools.cached_property
    def _search(self) -> Search:
        self._names, texts = map(list, zip(*self.inputs.selection.value, strict=True))
        tokens = sum(windows.numel() for windows in texts)
        saved = self.inputs.saved.value
        maps = self._all_maps

        def saving(gone: Sequence[int]) -> float:
            return saved({i: maps[i] for i in gone}, _WEIGHED_TOKENS)

        with self._task(f"trying each layer on {tokens} tokens") as progress:
            return Search(Judge(self.partial, texts), self._steps, saving, progress, self.asked.kept)

    @property
    def _all_maps(self) -> dict[int, Mixer]:
        return self.maps_of(range(self.inputs.num_layers))

    # -- records -----------------------------------------------------------------------------------------------

    def _recorded(self) -> tuple[Point, ...]:
        """The recorded sets if they were found from the same inputs, else none."""
        found = self._found
        try:
            if not found or found["key"] != self.key:
                return ()
            self._names = [str(name) for name in found["texts"]]
            return tuple(read_record(Point, step) for step in found["steps"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return ()  # a damaged order is computed again

    @property
    def key(self) -> str:
        """Fingerprint of what an order by the model's output follows from."""
        inputs = self.inputs
        asked = self.asked
        parts = (inputs.sums, inputs.partial, inputs.selection, inputs.saved)
        facts = (asked.tap, asked.bias, asked.dropped, asked.kept)
        return key_of(RULE, EVERY, _WEIGHED_TOKENS, [identity_of(part) for part in parts], facts)

    def facts(self) -> dict[str, Any]:
        """Facts for the manifest: the order, so that it is not computed twice, and the curve that it gives."""
        if not self._steps:
            return {"curve": None}
        steps = [dataclasses.asdict(step) for step in self._steps]
        greedy = {"key": self.key, "texts": self._names, "steps": steps}
        points = []
        for found in self._steps:
            maps = self.maps_of(found.layers)
            points.append(point(maps, self.inputs.speedup.value(maps), found.kl, found.increases))
        return {"greedy": greedy, "curve": {"texts": self._names, **self.inputs.setting.value, "points": points}}


# -- from scores and a request to a plan -----------------------------------------------------------------------


def ranked(scores: Sequence[LayerScore]) -> tuple[int, ...]:
    """All layers, the smallest bound of the paper first; the lower layer first on a tie."""
    return tuple(s.layer for s in sorted(scores, key=lambda s: (s.bound, s.layer)))


def plan_of(
    scores: Sequence[LayerScore],
    request: int | tuple[int, ...],
    tap: str = "residual",
    select: str = "cca",
    order: Sequence[int] | None = None,
) -> Plan:
    """The plan for a count or for named layers.

    A count takes the first layers of `order` (default: `ranked`).
    """
    if isinstance(request, int):
        order = ranked(scores) if order is None else order
        replaced = tuple(sorted(order[:request]))
    else:
        replaced = request
        select = "given"
    return Plan.of(len(scores), dict.fromkeys(replaced, Linear.kind), tap, select, tuple(scores))
