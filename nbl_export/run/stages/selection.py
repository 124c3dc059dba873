"""Scores, order and maps of a job's layers, each computed at first use.

An order by the model's output uses held-back text: no map is fitted on it, and no final figure comes from it
(`text.held_back`). Half of this text is the second text, which nobody calibrates on. The calibration text alone does
not show what upper layers do on other text. With this text alone, SmolLM2's layer 24 was replaced early, at twice the
quality loss on WikiText (docs/experiments.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from nbl_export.calibrate.moments_file import whole_moments
from nbl_export.files import key_of
from nbl_export.measure.cost import map_sizes
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import FitOptions, Mixer
from nbl_export.model.mixes import SwitchedModel
from nbl_export.options.goals import default_select, read_rank, saving_inputs
from nbl_export.plan.choose import ranked
from nbl_export.plan.effects import EVERY, Judge
from nbl_export.plan.greedy import RULE, GreedyOrder, Point, Search
from nbl_export.records.plan import LayerScore
from nbl_export.run.job import Job
from nbl_export.run.stages.common import cost_of
from nbl_export.run_directory import MOMENTS_FILE
from nbl_export.text.held_back import DIVISION, judging, spread

__all__ = ["Selection"]

_WEIGHED_TOKENS = 512  # of the prefill whose saved arithmetic is weighed, independent of --prompt-tokens
_STRETCHES = 8  # the curve has a point at each eighth of the layers, up to half of them


class Selection:
    """Scores, order and maps of one job.

    Args:
        instead: options that replace the job's.
    """

    def __init__(self, job: Job, **instead: Any) -> None:
        self._job = job
        self._options = dataclasses.replace(job.options, **instead)
        self._kind = kind_of(self._options.kind)
        self._order: GreedyOrder | None = None
        self._names: list[str] = []  # of the texts that gave the order
        self._maps: dict[int, Mixer] = {}

    @functools.cached_property
    def scores(self) -> tuple[LayerScore, ...]:
        """Scores of all layers: bounds of the residual tap for every tap, and errors of the chosen tap's maps."""
        found, tap = [], self._options.tap
        with whole_moments(self._job.run.path / MOMENTS_FILE) as file:
            for i in range(file.num_layers):
                score = self._kind.score(file.sums(i, "residual").moments(), i)
                if tap != "residual":
                    options = FitOptions(bias=self._options.has_bias)
                    score = dataclasses.replace(
                        self._kind.score(file.sums(i, tap).moments(), i, options), bound=score.bound
                    )
                found.append(score)
        return tuple(found)

    def map_of(self, layer: int) -> Mixer:
        """The map that replaces a layer's attention."""
        return self.maps_of((layer,))[layer]

    def maps_of(self, layers: Collection[int]) -> dict[int, Mixer]:
        """The maps of some layers; the moments of one layer at a time are in memory."""
        missing = [i for i in layers if i not in self._maps]
        options = FitOptions(read_rank(self._options.rank), self._options.has_bias)
        if missing:
            with whole_moments(self._job.run.path / MOMENTS_FILE) as file:
                for i in missing:
                    self._maps[i] = self._kind.fit(file.sums(i, self._options.tap).moments(), i, options)
        return {i: self._maps[i] for i in layers}

    # -- the model in which any set of layers can be replaced -------------------------------------------------

    @functools.cached_property
    def switched(self) -> SwitchedModel:
        """The torch model, in which any set of layers can be replaced."""
        maps = self.maps_of(range(self._job.spec.num_layers))
        return SwitchedModel(self._job.model, maps, self._options.tap, narrow=self._job.narrow)

    # -- order -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def select(self) -> str:
        """The selection method: that of the options, or the best method that memory allows.

        A limit on quality asks for the layers that cost least, a count for the best quality at the speed that it gives.
        """
        if self._options.select is not None:
            return self._options.select
        if self._job.graph is not None:  # greedy needs the torch model
            return "cca"
        if self._job.shortage:
            self._job.ui.say("  choosing layers by CCA bounds: --select greedy and efficient need the model in memory")
            return "cca"
        return default_select(self._options)

    @property
    def judges(self) -> bool:
        """Whether the model's output gives the order."""
        return self.select in ("greedy", "efficient")

    def order(self, count: int) -> tuple[int, ...]:
        """The first `count` layers to replace; a smaller count gives a prefix of a larger count's layers."""
        if not self.judges:
            return ranked(self.scores, self.select)[:count]
        return self._extended(count).layers[:count]

    def foreseen(self, increase: float) -> int:
        """The most layers whose increase of perplexity on the choosing windows is at most `increase` on every text.

        0 if the model's output does not give the order.
        """
        count = 0
        while self.judges and count < self._job.spec.num_layers - 1:
            if self._extended(count + 1).steps[count].worst_increase > increase:
                break
            count += 1
        return count

    def outlook(self, count: int) -> None:
        """Find the sets of a curve beyond `count` layers, unless they are recorded."""
        layers = self._job.spec.num_layers
        wanted = sorted({round(k * layers / _STRETCHES) for k in range(1, _STRETCHES // 2 + 1)} - {0})
        order = self._extended(count)
        known = {len(point.layers) for point in (*order.steps, *order.beyond)}
        missing = [n for n in wanted if n not in known and len(order.steps) < n < layers]
        if missing:
            with self._job.ui.task("larger sets") as progress:
                self._order = self._search.outlook(missing, progress)

    def _extended(self, count: int) -> GreedyOrder:
        self._order = self._order or self._recorded()
        if len(self._order.steps) < count:
            search = self._search
            with self._job.ui.task("sets of layers") as progress:
                self._order = search.extend(count, progress)
        return self._order

    @functools.cached_property
    def _search(self) -> Search:
        self._names, texts = map(list, zip(*self._judging, strict=True))
        tokens = sum(windows.numel() for windows in texts)
        order = self._order or GreedyOrder()
        with self._job.ui.task(f"trying each layer on {tokens} tokens") as progress:
            return Search(Judge(self.switched, texts), order, self._saving, progress)

    @property
    def _judging(self) -> list[tuple[str, Any]]:
        """Name and windows of the texts that layers are chosen by: equally many of both, spread over the second."""
        near = judging(self._job.held_back)
        found = [(f"held back from {self._job.text.name}", near)]
        far = None if self._options.says_itself else self._job.far
        if far is not None:
            found.append((f"{self._job.far_text.name} (not calibrated on)", spread(far.choosing, len(near))))
        return found

    @functools.cached_property
    def _saving(self) -> Callable[[Sequence[int]], float] | None:
        """Share of a prefill's arithmetic that replacing layers saves; None unless `select` is "efficient"."""
        if self.select != "efficient":
            return None
        model = dataclasses.replace(cost_of(self._job), tokens=_WEIGHED_TOKENS)
        sizes = map_sizes(self.maps_of(range(self._job.spec.num_layers)))
        return lambda gone: model.prefill_saved({i: sizes[i] for i in gone})

    # -- records -----------------------------------------------------------------------------------------------

    def _recorded(self) -> GreedyOrder:
        """The order in the manifest if it was made from the same inputs, else an empty order."""
        found = self._job.run.manifest.get("greedy")
        try:
            if not found or found["key"] != self._key:
                return GreedyOrder()
            self._names = [str(name) for name in found["texts"]]
            return GreedyOrder.from_json(found)
        except (KeyError, TypeError, ValueError):
            return GreedyOrder()  # a damaged order is computed again

    @property
    def _key(self) -> str:
        options = self._options
        weighed = [*saving_inputs(options), "square root"] if self.select == "efficient" else []
        calibrated = self._job.run.stages["calibrate"]["key"]
        judged = None if options.says_itself else self._job.far_text.sha256
        return key_of(
            RULE, EVERY, DIVISION, calibrated, judged, options.tap, options.fit == "drop", options.rank,
            options.compute_dtype, *([] if options.has_bias else [options.maps]), *weighed,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """Facts for the manifest: the order, so that it is not computed twice, and the curve that it gives."""
        if self._order is None:
            return {"curve": None}
        greedy = {"key": self._key, "texts": self._names, **dataclasses.asdict(self._order)}
        return {"greedy": greedy, "curve": self._curve(self._order)}

    def _curve(self, order: GreedyOrder) -> dict[str, Any]:
        model, points = cost_of(self._job), (*order.steps, *order.beyond)
        modelled = {"engine": self._options.engine, "precision": self._options.precision, "tokens": model.tokens}
        return {"texts": self._names, **modelled, "points": list(self._points(model, points))}

    def _points(self, model: Any, points: Sequence[Point]) -> Iterator[dict[str, Any]]:
        for point in points:
            speed = model.speedup(self.maps_of(point.layers))
            yield {
                "layers": len(point.layers), "replaced_layers": sorted(point.layers), "kl": list(point.kl),
                "increases": list(point.increases),
                "prefill": speed.prefill, "decode": speed.decode,
            }  # fmt: skip
