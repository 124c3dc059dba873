"""Plans from planted values: moments, a judge, window losses and speed-ups, without a run and a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.inputs import AskedGoal, MapKind, Maps, OrderInputs, PlanInputs
from nbl_export.methods.linear import order as order_of
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
        rise = self.factor * sum(10 if self.maps[i].kind == "none" else 1 for i in layers)
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
    monkeypatch.setattr(order_of, "Judge", Judge)
    Judge.rounds = 0
    Switched.made.clear()


def inputs(select: str = "cca", **kind: Any) -> OrderInputs:
    texts = [("recent_tokens", torch.zeros(2, 8)), ("long_range", torch.zeros(2, 8))]
    return OrderInputs(
        MapKind(**kind), LAYERS, select, Lazy("moments", lambda: moments_of),
        Lazy("model", lambda: Switched), Lazy("texts", lambda: texts),
        Lazy("saved", lambda: lambda maps, tokens: len(maps) * tokens / 10_000),
    )  # fmt: skip


def speedup(maps: Maps) -> Any:
    return SimpleNamespace(prefill=1 + len(maps) / 10, decode=1 + len(maps) / 20)


def plan_inputs(order: OrderInputs, request: Any = None, goal: AskedGoal | None = None, **given: Any) -> PlanInputs:
    values: dict[str, Any] = {
        "fit": "independent", "order": order, "request": request,
        "goal": goal or AskedGoal(0.1, None),
        "trains": Lazy(None, lambda: False),
        "validation": Lazy(None, lambda: [("recent_tokens", "one"), ("long_range", "another")]),
        "speedup": Lazy(None, lambda: speedup), "setting": Lazy(None, lambda: {"engine": "e"}),
    }  # fmt: skip
    return PlanInputs(**{**values, **given})


def planned(found: PlanInputs, **given: Any) -> tuple[Any, Any, Any, list[str]]:
    said: list[str] = []
    return *make_plan(found, Selection(found.order, **given), said.append), said


def never() -> Any:
    raise AssertionError("a plan by scores needs neither a model nor a text nor costs")


def test_a_count_takes_the_layers_with_the_best_scores() -> None:
    lazy: dict[str, Any] = dict.fromkeys(("validation", "speedup", "setting"), Lazy(None, never))
    heavy: dict[str, Any] = dict.fromkeys(("partial", "texts", "saved"), Lazy(None, never))
    plan, maps, facts, _ = planned(plan_inputs(dataclasses.replace(inputs(), **heavy), 3, **lazy))
    assert plan.layers == tuple(sorted(CHEAPEST)) == tuple(maps)
    assert (plan.select, plan.tap, facts) == ("cca", "residual", {"curve": None, "goal": None})


def test_named_layers_need_no_order() -> None:
    plan, _, _, _ = planned(plan_inputs(inputs("efficient"), (0, 7)))
    assert (plan.layers, plan.select, Judge.rounds) == ((0, 7), "given", 0)
    assert len(plan.scores) == LAYERS


def test_maps_are_of_their_kind() -> None:
    kinds: list[dict[str, Any]] = [{}, {"tap": "normed"}, {"tap": "normed", "bias": False}, {"kind": "none"}]
    found = [Selection(inputs(**kind)).maps_of([5])[5] for kind in kinds]
    assert not np.allclose(found[0].tensors()["weight"], found[1].tensors()["weight"])
    assert found[1].product() is None and found[2].product() is not None  # a product alone has no bias
    assert found[3].kind == "none"


def test_scores_of_another_tap_keep_the_bounds_of_the_residual_tap() -> None:
    residual, normed = (Selection(inputs(tap=tap)).scores for tap in ("residual", "normed"))
    assert [s.bound for s in residual] == [s.bound for s in normed]
    assert [s.nmse for s in residual] != [s.nmse for s in normed]


def test_the_order_of_a_judge_is_that_of_the_rule_and_is_made_once() -> None:
    """A shorter plan and another count take the recorded order."""
    longest = planned(plan_inputs(inputs("efficient"), 6))
    assert Judge.rounds == 1
    kept = longest[2]["greedy"]
    steps = [tuple(step["layers"]) for step in kept["steps"]]
    assert longest[0].layers == tuple(sorted(steps[-1])) and [len(step) for step in steps] == [1, 2, 3, 4, 5, 6]
    again = planned(plan_inputs(inputs("efficient"), 4), recorded=kept)
    assert again[0].layers == tuple(sorted(steps[3])) and again[2]["greedy"] == kept
    assert Judge.rounds == 1
    for damaged in ({**kept, "steps": "none"}, {"key": kept["key"]}, {**kept, "key": "other"}):
        assert planned(plan_inputs(inputs("efficient"), 6), recorded=damaged)[2]["greedy"] == kept
    assert Judge.rounds == 4


def test_the_curve_has_the_steps() -> None:
    curve = planned(plan_inputs(inputs("efficient"), 2))[2]["curve"]
    assert [point["layers"] for point in curve["points"]] == [1, 2]
    assert (curve["engine"], curve["texts"]) == ("e", ["recent_tokens", "long_range"])
    last = curve["points"][-1]
    assert len(last["replaced_layers"]) == 2 and last["prefill"] == pytest.approx(1.2)
    assert last["decode"] == pytest.approx(1.1) and len(last["increases"]) == len(last["kl"]) == 2


def test_without_a_count_a_limit_decides() -> None:
    plan, _, facts, said = planned(plan_inputs(inputs()))
    assert len(plan.layers) == 4  # exp(2 * 0.01 * 4) - 1 is within 10%, one layer more is not
    assert facts["goal"]["default"] and "10% is allowed" in said[0] and "5 layers" in said[1]
    asked = AskedGoal(0.01, "1%")
    with pytest.raises(NblError, match="--max-perplexity-increase 1% cannot be met"):
        planned(plan_inputs(inputs(), None, asked))


def test_another_input_or_rule_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of the order's inputs but the size of the model, which its fingerprint covers."""
    start = inputs("efficient")
    others: dict[str, Any] = {
        "kind": MapKind(bias=False),
        "moments": Lazy("o", lambda: moments_of), "partial": Lazy("o", lambda: Switched), "texts": Lazy("o", list),
        "saved": Lazy("o", lambda: lambda maps, tokens: 0.0), "kept": (0,),
    }  # fmt: skip
    assert {f.name for f in dataclasses.fields(OrderInputs)} == others.keys() | {"num_layers", "select"}
    keys = [Selection(dataclasses.replace(start, **{name: other})).key for name, other in others.items()]
    for name in ("RULE", "EVERY", "_WEIGHED_TOKENS"):
        with monkeypatch.context() as patch:
            patch.setattr(order_of, name, "another")
            keys.append(Selection(start).key)
    assert len({Selection(start).key, *keys}) == len(others) + 3 + 1
    assert Selection(inputs("efficient")).key == Selection(start).key
