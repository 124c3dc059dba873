"""Plans from planted values: moments, a judge, window losses and speed-ups, without a run and a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.base import Choice, ChoiceInputs, Limit, Maps
from nbl_export.methods.linear import order as order_module
from nbl_export.methods.linear.method import LayerCandidates
from nbl_export.methods.linear.order import Selection
from nbl_export.methods.linear.planning import make_plan
from nbl_export.methods.lmmse import Moments
from nbl_export.methods.losses import Loss
from nbl_export.records.inputs import Lazy
from tests.methods.linear.test_rule import LAYERS, Planted

SIZE = 4
CHEAPEST = (5, 2, 8)  # layers whose planted moments are nearly affine, best first


def moments_of(layer: int, tap: str) -> Moments:
    """Moments of 64 tokens, whose output is noise beside a planted map; less noise for the `CHEAPEST` layers."""
    random = np.random.default_rng([layer, len(tap)])
    x = random.standard_normal((64, SIZE))
    noise = 0.01 * (CHEAPEST.index(layer) + 1) if layer in CHEAPEST else 2.0
    y = x @ random.standard_normal((SIZE, SIZE)) + noise * random.standard_normal((64, SIZE))
    xs, ys = torch.from_numpy(x), torch.from_numpy(y)
    return Moments(64, xs.sum(0), ys.sum(0), xs.T @ xs, ys.T @ xs, ys.T @ ys)


class Switched:
    """Stands in for a model: a set of layers raises the loss by 0.01 for each layer, and by ten times that if dropped.

    On the text "another" the loss is twice as high.
    """

    made: list[tuple[Maps, str]] = []  # noqa: RUF012  emptied by `inputs`
    factor = 0.01

    def __init__(self, maps: Maps, tap: str) -> None:
        self.maps = maps
        self.made.append((maps, tap))

    def window_losses(self, windows: str, sets: Mapping[Any, Any], _progress: Any = None) -> dict[Any, list[Loss]]:
        return {name: [self._loss(windows, layers)] * 8 for name, layers in sets.items()}

    def _loss(self, windows: str, layers: Any) -> Loss:
        rise = self.factor * sum(1 if self.maps[i].stored()[0] else 10 for i in layers)
        rise *= 2 if windows == "another" else 1
        return Loss(511, 511 * rise / 2, 511 * 3.0, 511 * (3.0 + rise))


class Judge(Planted):
    """The planted judge of the rule, which counts how often it was asked for a round of trials."""

    rounds = 0

    def __init__(self, _switched: Any, texts: Any) -> None:
        super().__init__()
        assert [len(text) for text in texts] == [2, 2]

    def alone(self, progress: Any) -> Any:
        Judge.rounds += 1
        return super().alone(progress)


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "Judge", Judge)
    monkeypatch.setattr(
        order_module, "read_sums", lambda _file, layer, tap: SimpleNamespace(moments=lambda: moments_of(layer, tap))
    )
    Judge.rounds = 0
    Switched.made.clear()


def never() -> Any:
    raise AssertionError("a plan by scores needs neither a model nor a text nor costs")


def inputs(request: Any = None, select: str = "cca", limit: Limit | None = None, **candidates: Any) -> ChoiceInputs:
    texts = [("recent_tokens", torch.zeros(2, 8)), ("long_range", torch.zeros(2, 8))]
    validation: Any = [("recent_tokens", "one"), ("long_range", "another")]
    return ChoiceInputs(
        num_layers=LAYERS,
        candidates=LayerCandidates(request, select, **candidates),
        limit=limit or Limit(0.1, None),
        trains=Lazy(None, lambda: False),
        sums=Lazy("sums", lambda: cast(Any, SimpleNamespace())),
        model=Lazy(None, never),
        partial=Lazy("model", lambda: Switched),
        selection=Lazy("texts", lambda: texts),
        validation=Lazy(None, lambda: validation),
        selection_items=Lazy(None, never),
        validation_items=Lazy(None, never),
        saved=Lazy("saved", lambda: lambda maps, tokens: len(maps) * tokens / 10_000),
        speedup=Lazy(None, lambda: speedup),
        setting=Lazy(None, lambda: {"engine": "e"}),
    )


def speedup(maps: Maps) -> Any:
    return SimpleNamespace(prefill=1 + len(maps) / 10, decode=1 + len(maps) / 20)


def planned(found: ChoiceInputs, **given: Any) -> tuple[Choice, list[str]]:
    said: list[str] = []
    return make_plan(found, Selection(found, **given), said.append), said


def test_a_count_takes_the_layers_with_the_best_scores() -> None:
    heavy: dict[str, Any] = dict.fromkeys(
        ("partial", "selection", "saved", "validation", "speedup", "setting"), Lazy(None, never)
    )
    found, _ = planned(dataclasses.replace(inputs(3), **heavy))
    assert found.plan.layers == tuple(sorted(CHEAPEST)) == tuple(found.maps)
    assert (found.plan.select, found.plan.tap, found.facts) == ("cca", "residual", {"curve": None, "goal": None})


def test_named_layers_need_no_order() -> None:
    plan = planned(inputs((0, 7), "efficient"))[0].plan
    assert (plan.layers, plan.select, Judge.rounds) == ((0, 7), "given", 0)
    assert len(plan.scores) == LAYERS


def test_maps_are_those_of_the_candidates() -> None:
    asked: list[dict[str, Any]] = [{}, {"tap": "normed"}, {"tap": "normed", "bias": False}, {"dropped": True}]
    found = [Selection(inputs(**candidates)).maps_of([5])[5] for candidates in asked]
    assert not np.allclose(found[0].tensors()["weight"], found[1].tensors()["weight"])
    assert found[1].product() is None and found[2].product() is not None  # a product alone has no bias
    assert not any(array.any() for array in found[3].tensors().values())
    assert {mixer.kind for mixer in found} == {"linear"}


def test_dropped_attention_is_judged_and_tested_as_it_is() -> None:
    """A layer costs ten times what its map costs, so none is within what four fitted maps are within."""
    with pytest.raises(NblError, match="the default limit of 10% cannot be met"):
        planned(inputs(dropped=True))


def test_scores_of_another_tap_keep_the_bounds_of_the_residual_tap() -> None:
    residual, normed = (Selection(inputs(tap=tap)).scores for tap in ("residual", "normed"))
    assert [s.bound for s in residual] == [s.bound for s in normed]
    assert [s.nmse for s in residual] != [s.nmse for s in normed]


def test_the_order_of_a_judge_is_that_of_the_rule_and_is_made_once() -> None:
    """A shorter plan and another count take the recorded order."""
    longest, _ = planned(inputs(6, "efficient"))
    assert Judge.rounds == 1
    kept = longest.facts["greedy"]
    steps = [tuple(step["layers"]) for step in kept["steps"]]
    assert longest.plan.layers == tuple(sorted(steps[-1])) and [len(step) for step in steps] == [1, 2, 3, 4, 5, 6]
    again, _ = planned(inputs(4, "efficient"), recorded=kept)
    assert again.plan.layers == tuple(sorted(steps[3])) and again.facts["greedy"] == kept
    assert Judge.rounds == 1
    for damaged in ({**kept, "steps": "none"}, {"key": kept["key"]}, {**kept, "key": "other"}):
        assert planned(inputs(6, "efficient"), recorded=damaged)[0].facts["greedy"] == kept
    assert Judge.rounds == 4


def test_the_curve_has_the_steps() -> None:
    curve = planned(inputs(2, "efficient"))[0].facts["curve"]
    assert [point["layers"] for point in curve["points"]] == [1, 2]
    assert (curve["engine"], curve["texts"]) == ("e", ["recent_tokens", "long_range"])
    last = curve["points"][-1]
    assert len(last["replaced_layers"]) == 2 and last["prefill"] == pytest.approx(1.2)
    assert last["decode"] == pytest.approx(1.1) and len(last["increases"]) == len(last["kl"]) == 2


def test_without_a_count_a_limit_decides() -> None:
    found, said = planned(inputs())
    assert len(found.plan.layers) == 4  # exp(2 * 0.01 * 4) - 1 is within 10%, one layer more is not
    assert found.facts["goal"]["default"] and "10% is allowed" in said[0] and "5 layers" in said[1]
    with pytest.raises(NblError, match="--max-perplexity-increase 1% cannot be met"):
        planned(inputs(limit=Limit(0.01, "1%")))


def test_training_begins_with_layers_that_lose_more_than_the_limit_allows() -> None:
    """At 2.5 times the limit, which training may bring within it: three layers, of which one alone is within."""
    found = dataclasses.replace(inputs(None, "efficient", Limit(2.0, "200%")), trains=Lazy(None, lambda: True))
    choice, said = planned(found)
    worst = [max(point["increases"]) for point in choice.facts["curve"]["points"]]
    assert worst[0] < 2.0 < worst[1] < worst[2] < 5.0 < worst[3]
    assert len(choice.plan.layers) == len(choice.facts["goal"]["order"]) == 3
    assert said == [f"training begins with 3 of {LAYERS} layers, and gives back what is beyond 200%"]


def test_another_input_or_rule_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a judged order follows from, and no more: another count or limit takes the recorded order."""
    start = inputs(None, "efficient")
    others: dict[str, Any] = {
        "sums": Lazy("o", lambda: cast(Any, SimpleNamespace())), "partial": Lazy("o", lambda: Switched),
        "selection": Lazy("o", list), "saved": Lazy("o", lambda: lambda maps, tokens: 0.0),
    }  # fmt: skip
    asked: dict[str, Any] = {"tap": "normed", "bias": False, "dropped": True, "kept": (0,)}
    free = {"num_layers", "candidates", "limit", "trains", "model", "validation", "speedup", "setting",
            "selection_items", "validation_items"}  # fmt: skip
    assert {f.name for f in dataclasses.fields(ChoiceInputs)} == others.keys() | free
    assert {f.name for f in dataclasses.fields(LayerCandidates)} == asked.keys() | {"request", "select"}
    keys = [Selection(dataclasses.replace(start, **{name: other})).key for name, other in others.items()]
    keys += [Selection(inputs(None, "efficient", **{name: other})).key for name, other in asked.items()]
    for name in ("RULE", "EVERY", "_WEIGHED_TOKENS"):
        with monkeypatch.context() as patch:
            patch.setattr(order_module, name, "another")
            keys.append(Selection(start).key)
    assert len({Selection(start).key, *keys}) == len(others) + len(asked) + 3 + 1
    for same in (inputs(None, "efficient"), inputs(4, "efficient", limit=Limit(0.01, "1%"))):
        assert Selection(same).key == Selection(start).key
