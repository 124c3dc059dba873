"""Goals instead of a count: how they are read, what they choose, and how far the impossible ones get."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError, UsageError
from nbl_export.methods import choose
from nbl_export.methods.base import Limit
from nbl_export.methods.choose import count_estimated, count_trained, failure, step
from nbl_export.methods.linear.order import quiet
from nbl_export.methods.linear.planning import _test
from nbl_export.options.goals import asked_increase
from nbl_export.options.options import JobOptions
from tests.command import assert_refused, nbl
from tests.tiny import LAYERS

pytestmark = pytest.mark.job


def limited(text: str | None) -> JobOptions:
    return JobOptions("m", max_perplexity_increase=text)


def test_a_limit_is_read() -> None:
    for text, share in (("5%", 0.05), ("5", 0.05), ("0.5 %", 0.005), ("0%", 0.0), (None, 0.05)):
        assert asked_increase(limited(text)) == share


@pytest.mark.parametrize("text", ["0.05", "0", "-1%", "many", "%", "", "1e1%", "٣%"])
def test_a_limit_that_cannot_be_read_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"--max-perplexity-increase {text!r}")):
        asked_increase(limited(text))


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


def planned(run: Path, *given: object) -> Any:
    done = nbl("plan", run, *given)
    assert done.status == 0, done.err
    assert "calibrate: reused" in done.err
    return facts_of(run)


class Priced:
    """A selection whose first m layers raise perplexity by planted shares, on "another" text by twice as much; nan
    stands for logits not finite.

    spread: of the rises of 16 windows around theirs.
    """

    def __init__(self, *rises: float, spread: float = 1e-6, guess: int = 0) -> None:
        self.rises, self.spread, self.guess = rises, spread, guess
        self.tested: list[int] = []
        self.partial = self

    def order(self, count: int) -> tuple[int, ...]:
        return tuple(range(10, 10 + count))

    def expected_count(self, _increase: float) -> int:
        return self.guess

    def window_losses(self, windows: str, replaced_sets: dict[int, tuple[int, ...]], _progress: Any) -> Any:
        self.tested += list(replaced_sets)
        return {count: self._losses(windows, len(replaced_set)) for count, replaced_set in replaced_sets.items()}

    def quality_losses(self, windows: str, replaced_sets: dict[int, tuple[int, ...]], _progress: Any) -> Any:
        factor = 2 if windows == "another" else 1
        return {
            count: SimpleNamespace(perplexities=(8.0, 8.0 * (1 + factor * self.rises[len(replaced_set) - 1])))
            for count, replaced_set in replaced_sets.items()
        }

    def _losses(self, windows: str, count: int) -> Any:
        share = self.rises[count - 1] * (2 if windows == "another" else 1)
        after = 3.0 + np.log1p(share) + np.tile([-1.0, -1.0, 1.0, 1.0], 4) * self.spread
        return [
            SimpleNamespace(positions=511, original_sum=511 * 3.0, nbl_sum=511 * loss, kl_sum=1.0) for loss in after
        ]


def reached(
    selection: Priced, goal: str | None = "5%", texts: tuple[str, ...] = ("held back",)
) -> tuple[int, Any, list[str]]:
    stand_in: Any = selection
    limit = Limit(asked_increase(limited(goal)), goal)
    validation = [(f"{text} (deciding)", text) for text in texts]
    inputs: Any = SimpleNamespace(num_layers=5, limit=limit, validation=SimpleNamespace(value=validation))
    return choose.reached(_test(inputs, stand_in, quiet), limit)


@pytest.mark.parametrize(
    ("rises", "expected"),
    [
        ((0.02, 0.049, 0.09, 0.03), 2),  # what is longer and within it again has a shorter plan beyond it
        ((0.02, 0.03, 0.04, 0.0499), 4),
        ((-0.01, 0.06, 0.0, 0.0), 1),
        ((0.01, float("nan"), 0.0, 0.0), 1),
    ],
)
def test_the_longest_plan_of_which_every_front_is_within_the_increase(rises: tuple[float, ...], expected: int) -> None:
    count, facts, said = reached(Priced(*rises))
    assert count == expected
    assert [step["layer"] for step in facts["path"]] == list(range(10, 10 + min(expected + 1, 4)))
    assert [step["within"] for step in facts["path"]] == [True] * expected + [False] * (expected < 4)
    assert "5% is allowed" in said[0] and "held back (deciding)" in said[0]


@pytest.mark.parametrize(
    ("guess", "expected", "tested"),
    [
        (4, 3, [3, 4]),  # begins below what was estimated
        (9, 3, [4, 3]),  # a failure at the start: downwards to the first success
        (3, 3, [2, 3, 4]),
        (1, 3, [1, 2, 3, 4]),
    ],
)
def test_the_test_begins_where_the_selection_windows_estimate_it(guess: int, expected: int, tested: list[int]) -> None:
    selection = Priced(0.01, 0.02, 0.03, 0.09, guess=guess)
    count, facts, _ = reached(selection)
    assert count == expected
    assert selection.tested == tested
    assert [step["layers"] for step in facts["path"]] == sorted(tested)


def test_without_a_goal_the_default_increase_decides_and_says_what_one_layer_costs() -> None:
    count, facts, said = reached(Priced(0.02, 0.049, 0.06, 0.2), None)
    assert (count, facts["default"], facts["max_perplexity_increase"]) == (2, True, "5%")
    assert "5% is allowed" in said[0]
    limit = r"the default limit of 5% cannot be met: one layer alone \(10\) .*\+12\..*--layers N"
    with pytest.raises(NblError, match=limit):
        reached(Priced(0.12, 0.2, 0.2, 0.2), None)


def test_the_worse_text_decides() -> None:
    rises = (0.02, 0.024, 0.03, 0.04)
    assert reached(Priced(*rises))[0] == 4
    for texts in (("held back", "another"), ("another", "held back")):
        count, _, said = reached(Priced(*rises), texts=texts)
        assert count == 2 and "+6.0" in said[1] and "on another" in said[1]
        count, _, said = reached(Priced(0.02, 0.06, 0.07, 0.08), texts=texts)  # both are beyond
        assert count == 1 and "+12.0" in said[1] and "on another" in said[1]


def test_the_upper_end_of_the_interval_decides() -> None:
    rises = (0.01, 0.04, 0.045, 0.045)
    assert reached(Priced(*rises))[0] == 4
    count, facts, said = reached(Priced(*rises, spread=0.03))
    assert count == 1
    quality_loss = facts["path"][1]["quality_losses"][0]
    low, high = quality_loss["increase_interval"]
    assert low < 0.05 < high
    assert "8,192 tokens cannot tell from 5%" in said[1]
    with pytest.raises(NblError, match=r"cannot be met: one layer alone \(10\).*8,192 tokens cannot tell from 1\.5%"):
        reached(Priced(*rises, spread=0.03), "1.5%")
    with pytest.raises(NblError, match=r"cannot be met: one layer alone \(10\) gives perplexity \+1\.00000"):
        reached(Priced(*rises), "0.9%")


def test_one_window_has_no_interval_and_is_not_within_the_limit() -> None:
    windows = Priced(0.0)._losses("held back", 1)
    assert step({}, {"held back": windows}, 0.05)["within"]
    assert not step({}, {"held back": windows[:1]}, 0.05)["within"]


def test_a_text_beyond_the_limit_is_named_before_a_worse_one_that_is_undecided() -> None:
    clear = Priced(0.06)._losses("held back", 1)
    wide = Priced(0.08, spread=0.1)._losses("held back", 1)
    for losses in ({"clear": clear, "wide": wide}, {"wide": wide, "clear": clear}):
        assert failure(step({}, losses, 0.05), Limit(0.05, None)).endswith("on clear")


def test_perplexity_increase_through_the_job(run: Path) -> None:
    wide = planned(run, "--max-perplexity-increase", "100000%", "--exit-layer", "none")
    steps = wide["goal"]["path"]
    assert [s["layers"] for s in steps] == list(range(1, LAYERS))
    assert len(wide["replaced_layers"]) == LAYERS - 1
    assert {s["layer"] for s in steps} == set(wide["replaced_layers"])
    first = max(quality_loss["increase_interval"][1] for quality_loss in steps[0]["quality_losses"])
    assert first > 0, "otherwise choose another tiny model"
    again = planned(run, "--max-perplexity-increase", f"{101 * first:.6f}%", "--exit-layer", "none")
    found = again["goal"]["path"][0]["quality_losses"]
    assert [one["increase"] for one in found] == [one["increase"] for one in steps[0]["quality_losses"]]
    assert again["options"]["layers"] is None and "--max-perplexity-increase" in again["command"]
    before = (run / "nbl.json").read_bytes()
    refused = nbl("plan", run, "--max-perplexity-increase", f"{99 * first:.6f}%", "--exit-layer", "none")
    assert_refused(refused, 1, "cannot be met", "one layer alone", "gives perplexity ")
    assert (run / "nbl.json").read_bytes() == before
    assert planned(run, "--layers", "1")["goal"] is None


@pytest.mark.parametrize(
    ("rises", "text", "count"),
    [
        ((0.01, 0.02, 0.04, 0.06), "held back", 3),
        ((0.01, 0.02, 0.04, 0.06), "another", 2),
        ((0.01, 0.06, 0.04, 0.06), "held back", 3),  # a larger set that keeps the limit is better
        ((0.06, 0.07, 0.08, 0.09), "held back", 1),
        ((0.01, 0.02, 0.04, math.nan), "held back", 3),
    ],
)
def test_the_layers_that_stay_in_training_are_estimated(rises: tuple[float, ...], text: str, count: int) -> None:
    model: Any = Priced(*rises)
    texts: Any = [("held back", "held back"), (text, text)]
    for order in (texts, texts[::-1]):  # wherever the worse text stands
        assert count_estimated(model, (3, 1, 2, 0), 0.05, order, quiet) == count


def test_trained_maps_are_tested_downwards() -> None:
    limit, texts = Limit(0.05, "5%"), [("recent_tokens", "held back")]
    model: Any = Priced(0.01, 0.03, 0.06, 0.07)
    count, facts, said = count_trained(model, (7, 3, 1, 2), limit, texts, quiet)
    assert (count, model.tested) == (2, [4, 3, 2])
    assert {name: facts[name] for name in ("max_perplexity_increase", "default")} == {
        "max_perplexity_increase": "5%", "default": False,
    }  # fmt: skip
    assert [step["within"] for step in facts["path"]] == [True, False, False]
    assert said[0].startswith("2 layers replaced: perplexity +3.0") and said[1].startswith("3 layers (with 1): ")
    model = Priced(0.06, 0.07)
    with pytest.raises(NblError, match=r"^--max-perplexity-increase 5% cannot be met: one layer alone \(7\)"):
        count_trained(model, (7, 3), limit, texts, quiet)


def test_an_impossible_goal_ends_the_job_before_the_rewrite(same: tuple[object, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused = nbl(*same, "--max-perplexity-increase", "0.00001%", "--exit-layer", "none", "--output", run)
    assert_refused(refused, 1, "cannot be met")
    assert not (run / "model").exists() and not (run / "original").exists()
