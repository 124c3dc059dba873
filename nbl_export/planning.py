"""The plan stage of a job: scores of all layers, the order in which they go, the maps of those that do.

    moments ─► scores ─► order (`--select`) ─► the first m of it, or the layers named ─► maps

What orders the layers by the model's output reads text that no map was fitted on and no figure is taken on
(`held_back`), and as much of a text that nobody calibrates on. Text like that of calibration alone does not see what
the upper layers do on other text: by it SmolLM2's layer 24 went early, at twice the price on WikiText
(bench/README.md).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from nbl_export import blocks, calibrate, lmmse, methods, narrow
from nbl_export.artifacts import key_of
from nbl_export.cost import map_sizes
from nbl_export.goals import goal_of, read_rank
from nbl_export.greedy import GreedyOrder, extend, near_and_far
from nbl_export.held_back import DIVISION, judging
from nbl_export.job import Job
from nbl_export.plan import choose, ranked
from nbl_export.reach import count_for_goal
from nbl_export.records import AffineMap, LayerScore, Plan
from nbl_export.switched import SwitchedModel

__all__ = ["Selection", "make_plan"]


def make_plan(job: Job) -> tuple[Plan, dict[int, AffineMap], dict[str, Any]]:
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


_WEIGHED_TOKENS = 512  # of the prefill whose arithmetic a layer saves, whatever is measured later


class Selection:
    """Scores, order and maps of one job, computed when first asked for.

    Args:
        instead: options that take the place of the job's.
    """

    def __init__(self, job: Job, **instead: Any) -> None:
        self._job = job
        self._options = dataclasses.replace(job.options, **instead)
        self._greedy: GreedyOrder | None = None
        self._maps: dict[int, AffineMap] = {}

    @functools.cached_property
    def _moments(self) -> dict[str, list[lmmse.Moments]]:
        return calibrate.load_moments(self._job.run.path / "moments.safetensors")

    @functools.cached_property
    def scores(self) -> tuple[LayerScore, ...]:
        """The bound is of the residual output, whatever the tap; the errors are those of the tap's maps."""
        bounds = [lmmse.score(m, i) for i, m in enumerate(self._moments["residual"])]
        if self._options.tap == "residual":
            return tuple(bounds)
        errors = [lmmse.score(m, i) for i, m in enumerate(self._moments[self._options.tap])]
        return tuple(dataclasses.replace(e, bound=b.bound) for e, b in zip(errors, bounds, strict=True))

    def map_of(self, layer: int) -> AffineMap:
        """What stands in for the attention of a layer."""
        if layer not in self._maps:
            self._maps[layer] = self._make_map(layer)
        return self._maps[layer]

    def _make_map(self, layer: int) -> AffineMap:
        options, spec = self._options, self._job.spec
        if options.method == "drop":
            return methods.drop_map(spec.hidden_size)
        if options.method == "wo-wv":
            model = self._job.model
            attention = model.get_decoder().layers[layer].self_attn
            return methods.own_token_map(attention, spec, blocks.multiplier_of(model.config))
        return lmmse.fit(self._moments[options.tap][layer], layer, rank=read_rank(options.rank))

    @functools.cached_property
    def switched(self) -> SwitchedModel:
        """The model in which any layers may be replaced."""
        maps = {i: self.map_of(i) for i in range(self._job.spec.num_layers)}
        return SwitchedModel(self._job.model, maps, self._options.tap)

    @functools.cached_property
    def select(self) -> str:
        """How layers are chosen: as asked for, or the best way that memory allows."""
        if self._options.select is not None:
            return self._options.select
        if self._job.graph is not None:  # greedy needs the torch model
            return "cca"
        if self._options.layer_wise or self._job.shortage:
            self._job.ui.say("  layers by their CCA bounds: --select efficient needs the whole model in memory")
            return "cca"
        return "efficient"

    def order(self, count: int) -> tuple[int, ...]:
        """The first `count` layers to go; those of a smaller count are the front of those of a larger one."""
        if self.select not in ("greedy", "efficient"):
            return ranked(self.scores, self.select)[:count]
        self._greedy = self._greedy or self._recorded()
        if len(self._greedy.layers) < count:
            far = None if self._options.data_free else self._job.far  # data-free reads no text
            windows = near_and_far(judging(self._job.held_back), far.choosing if far else None)
            layers = self._job.spec.num_layers
            device = self._job.model.device
            with (
                self._job.ui.task(f"trying layers on {windows.numel()} tokens") as progress,
                narrow.products(device, narrow.fast(device)),
            ):
                self._greedy = extend(self._greedy, count, self.switched, layers, windows, progress, self._saving)
        return self._greedy.layers[:count]

    @functools.cached_property
    def _saving(self) -> Callable[[Sequence[int]], float] | None:
        """Share of the arithmetic of a prefill that giving up layers saves, for the select that weighs it."""
        if self.select != "efficient":
            return None
        from nbl_export.reach import cost_model

        model = dataclasses.replace(cost_model(self._job), tokens=_WEIGHED_TOKENS)
        sizes = map_sizes({i: self.map_of(i) for i in range(self._job.spec.num_layers)})
        return lambda gone: model.prefill_saved({i: sizes[i] for i in gone})

    def _recorded(self) -> GreedyOrder:
        """The order that the manifest knows, where it was made from the same inputs."""
        found = self._job.run.manifest.get("greedy")
        try:
            return GreedyOrder.from_json(found) if found and found["key"] == self._greedy_key else GreedyOrder()
        except (KeyError, TypeError, ValueError):
            return GreedyOrder()  # a damaged one is made again

    @property
    def _greedy_key(self) -> str:
        options = self._options
        weighed = [options.kept_logits, "square root"] if self.select == "efficient" else []
        calibrated = self._job.run.stages["calibrate"]["key"]
        judged = None if options.data_free else self._job.far_text.sha256
        return key_of("greedy", DIVISION, calibrated, judged, options.tap, options.method, options.rank, *weighed)

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps, so that no order is made twice."""
        if self._greedy is None:
            return {}
        return {"greedy": {"key": self._greedy_key, **dataclasses.asdict(self._greedy)}}
