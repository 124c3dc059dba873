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
from nbl_export.methods import kind_of
from nbl_export.methods.base import Mixer
from nbl_export.methods.inputs import Maps, OrderInputs, Task
from nbl_export.methods.linear.greedy import EVERY, RULE, Judge, Point, Search
from nbl_export.methods.losses import PartialReplacement
from nbl_export.records.from_json import read_record
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.records.plan import USUAL_KIND, LayerScore, Plan

__all__ = ["Selection", "choose", "quiet", "ranked"]

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

    def __init__(self, inputs: OrderInputs, task: Task = quiet, recorded: Mapping[str, Any] | None = None) -> None:
        self.inputs = inputs
        self._task = task
        self._found = recorded
        self._steps: tuple[Point, ...] = ()
        self._names: list[str] = []  # of the texts that gave the order
        self._maps: dict[int, Mixer] = {}

    @functools.cached_property
    def scores(self) -> tuple[LayerScore, ...]:
        """Scores of all layers: bounds at the residual tap for every tap, errors of the chosen one."""
        asked = self.inputs.kind
        moments = self.inputs.moments.value
        found = []
        kind = kind_of(asked.kind)
        for i in range(self.inputs.num_layers):
            score = kind.score(moments(i, "residual"), i)
            if asked.tap != "residual":
                own = kind.score(moments(i, asked.tap), i, bias=asked.bias)
                score = dataclasses.replace(own, bound=score.bound)
            found.append(score)
        return tuple(found)

    def maps_of(self, layers: Collection[int]) -> dict[int, Mixer]:
        """The maps of some layers; the moments of one layer at a time are in memory."""
        self._maps |= self._fit([i for i in layers if i not in self._maps])
        return {i: self._maps[i] for i in layers}

    def _fit(self, layers: Collection[int]) -> dict[int, Mixer]:
        asked = self.inputs.kind
        moments = self.inputs.moments.value
        kind = kind_of(asked.kind)
        return {i: kind.fit(moments(i, asked.tap), i, bias=asked.bias) for i in layers}

    @functools.cached_property
    def partial(self) -> PartialReplacement:
        """The torch model, in which any set of layers can be replaced."""
        return self.inputs.partial.value(self._all_maps, self.inputs.kind.tap)

    # -- order -------------------------------------------------------------------------------------------------

    @property
    def judges(self) -> bool:
        """Whether the model's output gives the order."""
        return self.inputs.select == "efficient"

    def order(self, count: int) -> tuple[int, ...]:
        """The first `count` layers to replace; a smaller count gives a prefix of a larger count's layers."""
        if not count:
            return ()
        if not self.judges:
            return tuple(i for i in ranked(self.scores) if i not in self.inputs.kept)[:count]
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
        self._names, texts = map(list, zip(*self.inputs.texts.value, strict=True))
        tokens = sum(windows.numel() for windows in texts)
        saved = self.inputs.saved.value
        maps = self._all_maps

        def saving(gone: Sequence[int]) -> float:
            return saved({i: maps[i] for i in gone}, _WEIGHED_TOKENS)

        with self._task(f"trying each layer on {tokens} tokens") as progress:
            return Search(Judge(self.partial, texts), self._steps, saving, progress, self.inputs.kept)

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
        parts = (inputs.kind, inputs.moments, inputs.partial, inputs.texts, inputs.saved)
        return key_of(RULE, EVERY, _WEIGHED_TOKENS, [identity_of(part) for part in parts], inputs.kept)

    def facts(self, speedup: Lazy[Callable[[Maps], Any]], setting: Lazy[Mapping[str, Any]]) -> dict[str, Any]:
        """Facts for the manifest: the order, so that it is not computed twice, and the curve that it gives.

        Args:
            speedup: modelled speed-ups of some maps. setting: what they are modelled for.
        """
        if not self._steps:
            return {"curve": None}
        steps = [dataclasses.asdict(step) for step in self._steps]
        greedy = {"key": self.key, "texts": self._names, "steps": steps}
        points = [self._point(speedup.value, point) for point in self._steps]
        return {"greedy": greedy, "curve": {"texts": self._names, **setting.value, "points": points}}

    def _point(self, speedup: Callable[[Maps], Any], point: Point) -> dict[str, Any]:
        speed = speedup(self.maps_of(point.layers))
        return {
            "layers": len(point.layers),
            "replaced_layers": sorted(point.layers),
            "kl": list(point.kl),
            "increases": list(point.increases),
            "prefill": speed.prefill,
            "decode": speed.decode,
        }


# -- from scores and a request to a plan -----------------------------------------------------------------------


def ranked(scores: Sequence[LayerScore]) -> tuple[int, ...]:
    """All layers, the smallest bound of the paper first; the lower layer first on a tie."""
    return tuple(s.layer for s in sorted(scores, key=lambda s: (s.bound, s.layer)))


def choose(
    scores: Sequence[LayerScore],
    request: int | tuple[int, ...],
    tap: str = "residual",
    select: str = "cca",
    order: Sequence[int] | None = None,
    kind: str = USUAL_KIND,
) -> Plan:
    """The plan for a count or for named layers, all of one kind.

    A count takes the first layers of `order` (default: `ranked`).
    """
    if isinstance(request, int):
        order = ranked(scores) if order is None else order
        replaced = tuple(sorted(order[:request]))
    else:
        replaced = request
        select = "given"
    return Plan.of(len(scores), dict.fromkeys(replaced, kind), tap, select, tuple(scores))
