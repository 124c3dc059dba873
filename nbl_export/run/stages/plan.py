"""The plan stage: scores of all layers, the order of replacement, and the maps of replaced layers.

    moments ─► scores ─► order (`--select`) ─► its first m layers, or the named layers ─► maps

An order by the model's output uses held-back text: no map is fitted on it, and no final figure comes from it
(`held_back`). Half of this text is the second text, which nobody calibrates on. The calibration text alone does not
show what upper layers do on other text. With this text alone, SmolLM2's layer 24 was replaced early, at twice the
quality loss on WikiText (docs/experiments.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbl_export.calibrate import hooks
from nbl_export.cost.model import map_sizes
from nbl_export.files import key_of
from nbl_export.model import bfloat16
from nbl_export.model.checkpoint.nbl import GIVEN_FIT
from nbl_export.model.mixes import SwitchedModel
from nbl_export.plan import lmmse
from nbl_export.plan.choose import choose, ranked
from nbl_export.plan.goals import goal_of, read_rank
from nbl_export.plan.greedy import GreedyOrder, extend, near_and_far
from nbl_export.records import moments
from nbl_export.records.plan import AffineMap, LayerScore, Plan, zero_map
from nbl_export.run.job import Job
from nbl_export.run.stages.goal import count_for_goal
from nbl_export.run_directory import MAPS_FILE, MOMENTS_FILE, START_FILE
from nbl_export.text.held_back import DIVISION, judging

__all__ = ["Selection", "run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    from nbl_export.model.checkpoint import nbl
    from nbl_export.plan.maps_file import save_maps

    given = job.options.fit == GIVEN_FIT
    facts: dict[str, Any] = {"ranks": {}, "goal": None}
    if given:
        plan, maps = nbl.load(job.source, job.spec.num_layers)
    else:
        plan, maps, facts = _make_plan(job)
    distilled = job.options.fit == "distilled" and plan.replaced
    save_maps(maps, out / (START_FILE if distilled else MAPS_FILE), plan.tap)
    return {
        "fit": {"kind": "independent" if distilled else job.options.fit},
        "replaced_layers": list(plan.replaced),
        "tap": plan.tap,
        "select": plan.select,
        "scores": [dataclasses.asdict(s) for s in plan.scores],
        **facts,
    }


def _make_plan(job: Job) -> tuple[Plan, dict[int, AffineMap], dict[str, Any]]:
    """The plan, the maps of its layers, and further facts for the manifest.

    Raises:
        NblError: the job's goal cannot be met.
    """
    selection = Selection(job)
    request, options, goal = job.request, job.options, None
    if goal_of(options) is not None:
        request, goal = count_for_goal(job, selection)
    order = selection.order(request) if isinstance(request, int) else None
    plan = choose(selection.scores, request, options.tap, selection.select if order is not None else "given", order)
    maps = {i: selection.map_of(i) for i in plan.replaced}
    ranks = {str(i): m.up.shape[1] for i, m in maps.items() if m.up is not None}
    return plan, maps, {**selection.facts(), "ranks": ranks, "goal": goal}


_WEIGHED_TOKENS = 512  # of the prefill whose saved arithmetic is weighed, independent of --prompt-tokens


class Selection:
    """Scores, order and maps of one job, computed at first use.

    Args:
        instead: options that replace the job's.
    """

    def __init__(self, job: Job, **instead: Any) -> None:
        self._job = job
        self._options = dataclasses.replace(job.options, **instead)
        self._greedy: GreedyOrder | None = None
        self._maps: dict[int, AffineMap] = {}

    @functools.cached_property
    def _moments(self) -> dict[str, list[moments.Moments]]:
        return hooks.load_moments(self._job.run.path / MOMENTS_FILE)

    @functools.cached_property
    def scores(self) -> tuple[LayerScore, ...]:
        """Scores of all layers: bounds of the residual tap for every tap, and errors of the chosen tap's maps."""
        bounds = [lmmse.score(m, i) for i, m in enumerate(self._moments["residual"])]
        if self._options.tap == "residual":
            return tuple(bounds)
        errors = [lmmse.score(m, i) for i, m in enumerate(self._moments[self._options.tap])]
        return tuple(dataclasses.replace(e, bound=b.bound) for e, b in zip(errors, bounds, strict=True))

    def map_of(self, layer: int) -> AffineMap:
        """The map that replaces a layer's attention."""
        if layer not in self._maps:
            self._maps[layer] = self._make_map(layer)
        return self._maps[layer]

    def _make_map(self, layer: int) -> AffineMap:
        options = self._options
        if options.fit == "drop":
            return zero_map(self._job.spec.hidden_size)
        return lmmse.fit(self._moments[options.tap][layer], layer, rank=read_rank(options.rank))

    @functools.cached_property
    def switched(self) -> SwitchedModel:
        """The torch model, in which any set of layers can be replaced."""
        maps = {i: self.map_of(i) for i in range(self._job.spec.num_layers)}
        return SwitchedModel(self._job.model, maps, self._options.tap)

    @functools.cached_property
    def select(self) -> str:
        """The selection method: that of the options, or the best method that memory allows."""
        if self._options.select is not None:
            return self._options.select
        if self._job.graph is not None:  # greedy needs the torch model
            return "cca"
        if self._job.shortage:
            self._job.ui.say("  choosing layers by CCA bounds: --select efficient needs the whole model in memory")
            return "cca"
        return "efficient"

    def order(self, count: int) -> tuple[int, ...]:
        """The first `count` layers to replace; a smaller count gives a prefix of a larger count's layers."""
        if self.select not in ("greedy", "efficient"):
            return ranked(self.scores, self.select)[:count]
        self._greedy = self._greedy or self._recorded()
        if len(self._greedy.layers) < count:
            far = None if self._options.says_itself else self._job.far
            windows = near_and_far(judging(self._job.held_back), far.choosing if far else None)
            layers = self._job.spec.num_layers
            device = self._job.model.device
            with (
                self._job.ui.task(f"trying layers on {windows.numel()} tokens") as progress,
                bfloat16.products(device, bfloat16.fast(device)),
            ):
                self._greedy = extend(self._greedy, count, self.switched, layers, windows, progress, self._saving)
        return self._greedy.layers[:count]

    @functools.cached_property
    def _saving(self) -> Callable[[Sequence[int]], float] | None:
        """Share of a prefill's arithmetic that replacing layers saves; None unless `select` is "efficient"."""
        if self.select != "efficient":
            return None
        from nbl_export.run.stages.common import cost_of

        model = dataclasses.replace(cost_of(self._job), tokens=_WEIGHED_TOKENS)
        sizes = map_sizes({i: self.map_of(i) for i in range(self._job.spec.num_layers)})
        return lambda gone: model.prefill_saved({i: sizes[i] for i in gone})

    def _recorded(self) -> GreedyOrder:
        """The order in the manifest if it was made from the same inputs, else an empty order."""
        found = self._job.run.manifest.get("greedy")
        try:
            return GreedyOrder.from_json(found) if found and found["key"] == self._greedy_key else GreedyOrder()
        except (KeyError, TypeError, ValueError):
            return GreedyOrder()  # a damaged order is computed again

    @property
    def _greedy_key(self) -> str:
        options = self._options
        weighed = [options.kept_logits, "square root"] if self.select == "efficient" else []
        calibrated = self._job.run.stages["calibrate"]["key"]
        judged = None if options.says_itself else self._job.far_text.sha256
        return key_of(
            "greedy", DIVISION, calibrated, judged, options.tap, options.fit == "drop", options.rank, *weighed
        )

    def facts(self) -> dict[str, Any]:
        """Facts for the manifest, so that an order is not computed twice."""
        if self._greedy is None:
            return {}
        return {"greedy": {"key": self._greedy_key, **dataclasses.asdict(self._greedy)}}
