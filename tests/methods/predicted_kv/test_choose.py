"""The choice of an exit layer, with losses that are known beforehand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.base import Choice, ChoiceInputs, Limit, Say
from nbl_export.methods.choose import failure, step
from nbl_export.methods.linear.order import quiet
from nbl_export.methods.losses import Loss
from nbl_export.methods.predicted_kv.candidates import ExitCandidates, Exits, candidate_exits
from nbl_export.methods.predicted_kv.choose import _spread
from nbl_export.methods.predicted_kv.choose import choose_exit as choose
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.method import PredictedKVMethod
from nbl_export.options.options import JobOptions
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.records.quality import long_range_row
from nbl_export.text import windows
from nbl_export.text.long_range import SHORT
from nbl_export.text.windows import joined

LAYERS, LENGTH = 8, 128
OWN, SECOND, TWICE = "own", "second", "twice"
LONG_RANGE = "long-range tokens"  # each loses a nat behind a short context
TEXTS = (OWN, SECOND, LONG_RANGE)
PAIRS, SENTENCES = "retrieval: pairs", "retrieval: sentences"
TOKEN = {OWN: 1, SECOND: 2, TWICE: 3, PAIRS: 4, SENTENCES: 5}  # of each text


def mixer(exit_layer: int, recent_tokens: int) -> PredictedKV:
    return PredictedKV(np.zeros((2, 8), np.float32), np.zeros(2, np.float32), 4, exit_layer, recent_tokens, 1e-6)


@dataclass
class World:
    """Increases of perplexity by (exit layer, W) and text, and what was computed.

    Attributes:
        answers: positions from the end of a row that are long-range tokens.
        before: loss of the original's tokens by text, if it is not half a nat.
        judged: exit layer, W, text, and judged positions.
        widths: of the rows of each run of the original.
    """

    rises: Mapping[tuple[int, int], Mapping[str, float]]
    spread: float = 0.0
    long_range_spread: float = 0.0  # on validation rows
    decides: bool = False
    answers: int = 16
    before: Mapping[str, float] = field(default_factory=dict)
    judged: list[tuple[int, int, str, list[int]]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)

    def partial(self, chosen: Mapping[int, PredictedKV], _tap: str) -> Any:
        world, first = self, next(iter(chosen.values()), None)

        def losses(
            ids_T: torch.Tensor, _base: Any, _last: Any, positions_N: torch.Tensor,
            each: list[torch.Tensor] | None = None,
        ) -> dict[int, Loss]:  # fmt: skip
            assert first is not None
            if each is not None:
                each.append(torch.zeros(len(positions_N)))
            text = next(n for n, token in TOKEN.items() if token == int(ids_T.max()))
            name = LONG_RANGE if positions_N[0] else text
            world.judged.append((first.exit_layer, first.recent_tokens, name, positions_N.tolist()))
            noise = (
                world.spread * (-1) ** (len(world.judged) // 2) * (positions_N[:2].tolist() == [0, 1])
            )  # on validation rows
            count = len(positions_N)
            rises = world.rises[first.exit_layer, first.recent_tokens]
            rise = rises.get(f"{name} of {text}", rises.get(name, 0.0))
            if name == LONG_RANGE:
                noise = world.decides * world.long_range_spread * (-1) ** (len(world.judged) // 2)
            rise = (rise if name == LONG_RANGE else math.log1p(rise)) + noise
            before = world.before.get(text, 0.5)
            return {0: Loss(count, rise * count, before * count, (before + rise) * count)}

        def cross_entropies(last_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
            assert len(last_ND) == len(target_N)
            return last_ND[:, 0] * (torch.arange(len(last_ND), 0, -1) <= world.answers)

        return SimpleNamespace(losses=losses, runs=self.runs, cross_entropies=cross_entropies)

    def runs(self, ids_WT: torch.Tensor, *, again: bool) -> Any:
        self.widths.append(ids_WT.shape[1])
        short = ids_WT.shape[1] == 2 * SHORT - 1
        rows_WTD = torch.full((*ids_WT.shape, 1), 1.0 * short)  # a nat is lost behind a short context
        run = SimpleNamespace(original=rows_WTD, last=lambda sets: iter([rows_WTD] * len(sets)))
        self.decides = self.decides if short else not again

        def of(_mixes: Any) -> Any:
            self.decides = False
            return run

        run.of = of
        return run


def answers(count: int) -> torch.Tensor:
    """The last tokens of eight rows."""
    return (torch.arange(LENGTH) >= LENGTH - count).long().expand(8, LENGTH)


def inputs(
    world: World, exits: Sequence[int] = (4, 5, 6), recent_choices: tuple[int, ...] = (1, 2), named: bool = False,
    limit: Limit | None = None, **changes: Any,
) -> ChoiceInputs:  # fmt: skip
    rows = {name: torch.full((8, LENGTH), token) for name, token in TOKEN.items()}
    items = [(name, torch.stack([rows[name], answers(12)], 1)) for name in (PAIRS, SENTENCES)]
    given: dict[str, Any] = {
        "num_layers": LAYERS, "limit": limit or Limit(0.05, None),
        "candidates": ExitCandidates(tuple(exits), recent_choices, named, Exits(tuple(exits), LENGTH)),
        "partial": Lazy(None, lambda: world.partial),
        "selection": Lazy(None, lambda: [(OWN, rows[OWN][:1]), (SECOND, rows[SECOND][:1]), (TWICE, rows[TWICE][:1])]),
        "validation": Lazy(None, lambda: [(OWN, rows[OWN]), (SECOND, rows[SECOND])]),
        "selection_items": Lazy(None, lambda: [(name, rows[:1]) for name, rows in items]),
        "validation_items": Lazy(None, lambda: items),
        "saved": Lazy(None, lambda: lambda chosen,
         tokens: len(chosen) - next(iter(chosen.values())).recent_tokens / tokens),
        "speedup": Lazy(None, lambda: lambda chosen: SimpleNamespace(prefill=1 + len(chosen) / 10, decode=1.0)),
        "setting": Lazy(None, dict),
        **dict.fromkeys(("trains", "sums", "model"), Lazy(None, lambda: None)),
    }  # fmt: skip
    return ChoiceInputs(**{**given, **changes})


def choose_exit(found: ChoiceInputs, say: Say = lambda _line: None, layers: int = LAYERS) -> Choice:
    def fit(exit_layer: int) -> dict[int, PredictedKV]:
        return {layer: mixer(exit_layer, 1) for layer in range(exit_layer, layers)}

    return choose(found, fit, quiet, say)


def exit_of(choice: Choice) -> tuple[int, int]:
    """Exit layer and recent tokens."""
    found: set[Any] = {(mixer.exit_layer, mixer.recent_tokens) for mixer in choice.maps.values()}  # type: ignore[attr-defined]
    assert len(found) == 1
    exit_layer, recent_tokens = found.pop()
    return exit_layer, recent_tokens


def rises(**by_text: float) -> dict[tuple[int, int], dict[str, float]]:
    """Too much at exit layer 4; at exit layer 5 with one recent token as given; little elsewhere."""
    little = dict.fromkeys(TEXTS, 0.01)
    much = dict.fromkeys(TEXTS, 0.2)
    return {(c, n): much if c == 4 else {**little, **by_text} if (c, n) == (5, 1) else little
            for c in (4, 5, 6) for n in (1, 2)}  # fmt: skip


def test_the_lowest_exit_layer_within_the_limit_is_taken_with_the_fewest_recent_tokens() -> None:
    world, said = World(rises()), list[str]()
    choice = choose_exit(inputs(world), said.append)
    plan = choice.plan
    facts = choice.facts
    assert plan.kinds == ("attention",) * 5 + ("predicted_kv",) * 3 and plan.select == "exit"
    assert exit_of(choice) == (5, 1)
    assert [(p["replaced_layers"][0], p["recent_tokens"]) for p in facts["curve"]["points"]] == [(5, 1), (4, 1)]
    assert facts["goal"]["path"][-1]["within"] and facts["goal"]["default"]
    assert said[0].startswith("exit layer 5, 1 recent tokens: perplexity +1") and said[0].endswith("; 5% is allowed")


@pytest.mark.parametrize(("text", "least"), [(OWN, 0.05), (SECOND, 0.05), (LONG_RANGE, 0.1)])
def test_each_text_can_refuse_an_exit_layer_alone(text: str, least: float) -> None:
    """Of long-range tokens, twice the limit may be lost."""
    for rise, recent_tokens in ((least - 0.005, 1), (least + 0.005, 2)):
        choice = choose_exit(inputs(World(rises(**{text: rise}))))
        assert exit_of(choice) == (5, recent_tokens)
    facts = choice.facts
    step = facts["goal"]["path"][-1]
    point = next(p for p in facts["curve"]["points"] if (p["replaced_layers"][0], p["recent_tokens"]) == (5, 1))
    assert [row["text"] for row in step["quality_losses"]] == [OWN, SECOND]
    assert [(row["text"], row["windows"]) for row in step["long_range"]] == [(OWN, 8), (SECOND, 8), (windows.TWICE, 4)]
    assert [(row["text"], row["windows"]) for row in step["retrieval"]] == [(PAIRS, 8), (SENTENCES, 8)]
    assert point["long_range"] == pytest.approx(0.01 if text != LONG_RANGE else 0.105)


@pytest.mark.parametrize("text", [OWN, SECOND, TWICE, PAIRS, SENTENCES])
def test_long_range_tokens_of_one_text_can_refuse_an_exit_layer_alone(text: str) -> None:
    """The mean over all texts is within the limit."""
    world = World(rises(**{f"{LONG_RANGE} of {text}": 0.13}))
    choice = choose_exit(inputs(world))
    assert exit_of(choice) == (5, 2)
    point = next(p for p in choice.facts["curve"]["points"] if (p["replaced_layers"][0], p["recent_tokens"]) == (5, 1))
    assert point["long_range"] == pytest.approx(0.13)


@pytest.mark.parametrize(("lost", "passages", "within"), [(0.13, 8, False), (0.09, 8, True), (0.13, 3, True)])
def test_each_text_decides_by_its_long_range_tokens_if_it_has_enough(lost: float, passages: int, within: bool) -> None:
    """Sixteen passages of another text lose nothing."""
    rows = [
        long_range_row("one", [(10, 20.0, 20.0, 10.0)] * 16),
        long_range_row("another", [(10, 20.0, 20.0 + 10 * lost, 10.0)] * passages),
    ]
    tested = step({}, {}, 0.05, rows)
    assert tested["within"] is within
    if not within:
        assert failure(tested, Limit(0.05, None)).endswith("on another")


def test_prompts_of_both_lengths_order_the_candidates() -> None:
    """One recent token saves more of a short prompt, and two more of both together."""
    saved = {(1, 512): 1.0, (1, 2048): 0.0}

    def of(chosen: Mapping[int, PredictedKV], tokens: int) -> float:
        return saved.get((next(iter(chosen.values())).recent_tokens, tokens), 0.9)

    assert exit_of(choose_exit(inputs(World(rises()), exits=(6,), saved=Lazy(None, lambda: of)))) == (6, 2)


def test_more_recent_tokens_are_tried_unless_the_loss_is_hopeless() -> None:
    """An exit layer of 9% is tried with two recent tokens, one of 11% is not."""
    for increase, exit_layer in ((0.09, 4), (0.11, 5)):
        world = World({**rises(), (4, 1): dict.fromkeys(TEXTS, increase), (4, 2): dict.fromkeys(TEXTS, 0.01)})
        assert exit_of(choose_exit(inputs(world)))[0] == exit_layer


def test_few_exit_layers_are_measured() -> None:
    """Twelve candidates take four measurements; an exit layer that holds is decided with more recent tokens without
    another one."""
    exits = tuple(range(4, 16))
    lost = {(c, n): dict.fromkeys(TEXTS, 0.045 if (c, n) == (9, 1) else 0.01 if c >= 9 else 0.2)
            for c in exits for n in (1, 2)}  # fmt: skip
    world = World(lost, spread=0.02)

    facts = choose_exit(inputs(world, exits=exits, num_layers=17), layers=17).facts
    assert [(step["layer"], step["recent_tokens"]) for step in facts["goal"]["path"]] == [(9, 2), (9, 1)]
    measured = [(p["replaced_layers"][0], p["recent_tokens"]) for p in facts["curve"]["points"]]
    assert measured == [(10, 1), (9, 1), (8, 1), (7, 1)]


@pytest.mark.parametrize(("spread", "long_range_spread"), [(0.04, 0.0), (0.0, 0.15)])
def test_an_interval_beyond_the_limit_refuses_what_was_estimated(spread: float, long_range_spread: float) -> None:
    """The mean is within the limit, and the upper end is not: of a text, or of long-range tokens."""
    wide = World({key: {**dict.fromkeys(TEXTS, 0.03), LONG_RANGE: 0.06} for key in rises()}, spread, long_range_spread)
    with pytest.raises(NblError, match="the default limit of 5% cannot be met"):
        choose_exit(inputs(wide))


def test_an_exit_layer_that_holds_with_more_recent_tokens_says_nothing_of_fewer() -> None:
    """(5, 2) is measured although (4, 4) was estimated within the limit, and is not decided."""
    lost = {(4, 1): 0.09, (4, 2): 0.06, (4, 4): 0.045, (5, 1): 0.07, (5, 2): 0.055, (5, 4): 0.045, (6, 1): 0.01}
    world = World({key: dict.fromkeys(TEXTS, rise) for key, rise in lost.items()}, spread=0.02)
    facts = choose_exit(inputs(world, recent_choices=(1, 2, 4))).facts
    assert [(step["layer"], step["recent_tokens"]) for step in facts["goal"]["path"][::-1]] == [(4, 4), (5, 4), (6, 1)]


def test_long_range_tokens_are_those_of_all_rows_of_second_halves_of_passages_and_of_answers() -> None:
    """Ordinary positions are every second one when estimated, and all when decided. Of answers, positions before
    tokens are judged."""
    world = World(rises(), answers=10_000)
    choose_exit(inputs(world, exits=(6,), recent_choices=(1,)))
    judged = [(name, positions[:2], positions[-1]) for _, _, name, positions in world.judged]
    ends = LENGTH - 2
    estimated = [
        (OWN, [0, 2], ends),
        (LONG_RANGE, [63, 64], ends),
        (SECOND, [0, 2], ends),
        (LONG_RANGE, [63, 64], ends),
    ]
    assert judged[:4] == estimated and judged[4] == (LONG_RANGE, [LENGTH // 2, LENGTH // 2 + 1], ends)
    answer = (LONG_RANGE, [ends - 11, ends - 10], ends)
    assert judged[5:8] == [answer, answer, (OWN, [0, 1], ends)] and judged[-16:] == [answer] * 16
    assert judged[-17] == (LONG_RANGE, [LENGTH, LENGTH + 1], 2 * LENGTH - 2)


def test_passages_that_decide_are_of_the_calibration_text() -> None:
    """As those that estimate are (`text.windows`): rows of twice the length, which no other text has."""
    seen: list[int] = []
    world = World(rises())
    runs = world.runs

    def watched(ids_WT: torch.Tensor, *, again: bool) -> Any:
        seen.extend(row.unique().tolist()[0] for row in ids_WT if len(row) == 2 * LENGTH)
        return runs(ids_WT, again=again)

    world.runs = watched  # type: ignore[method-assign]
    choose_exit(inputs(world, exits=(6,), recent_choices=(1,)))
    assert seen == [TOKEN[OWN]] * 4


def test_rows_with_few_long_range_tokens_do_not_count_and_a_text_without_any_says_nothing_of_them() -> None:
    for answers, known in ((7, False), (8, True)):
        facts = choose_exit(inputs(World(rises(), answers=answers))).facts
        assert bool(facts["goal"]["path"][-1]["long_range"]) is known


def test_items_without_enough_answers_decide_nothing_and_are_named() -> None:
    """A loss of all their answers is no reason; other items and texts decide."""
    lost = {f"{LONG_RANGE} of {PAIRS}": 0.9}
    few = torch.stack([torch.full((8, LENGTH), TOKEN[PAIRS]), answers(7)], 1)
    others = torch.stack([torch.full((8, LENGTH), TOKEN[SENTENCES]), answers(12)], 1)
    items = Lazy(None, lambda: [(PAIRS, few), (SENTENCES, others)])
    said = list[str]()
    choice = choose_exit(inputs(World(rises(**lost)), selection_items=items, validation_items=items), said.append)
    assert exit_of(choice) == (5, 1)
    tested = choice.facts["goal"]["path"][0]
    assert [(row["text"], row["judged"]) for row in tested["retrieval"]] == [(PAIRS, False), (SENTENCES, True)]
    assert [line for line in said if PAIRS in line] == [f"{PAIRS} is not judged: the original finds too few answers"]


@pytest.mark.parametrize(("perplexity", "judged"), [(1.99, True), (2.01, False)])
def test_items_whose_answers_the_original_does_not_find_decide_nothing(perplexity: float, judged: bool) -> None:
    """They refuse neither on the selection text nor on the validation text, and the user reads why."""
    world = World(rises(**{f"{LONG_RANGE} of {PAIRS}": 0.13}), before={PAIRS: math.log(perplexity)})
    said = list[str]()
    choice = choose_exit(inputs(world), said.append)
    assert exit_of(choice) == (5, 2 if judged else 1)
    row = choice.facts["goal"]["path"][0]["retrieval"][0]
    assert (row["text"], row["judged"]) == (PAIRS, judged)
    end = f"on {PAIRS}" if judged else f"{PAIRS} is not judged: the original finds too few answers"
    assert [line for line in said if PAIRS in line][-1].endswith(end)


def test_the_original_is_read_once_for_all_exit_layers_and_long_range_tokens_are_found_once() -> None:
    """Three selection rows and two of items; then eight rows of both texts and of both kinds of items, and four of
    passages, for each of two decided layers."""
    world = World(rises(**{OWN: 0.045}), spread=0.02)
    facts = choose_exit(inputs(world)).facts
    assert len(facts["goal"]["path"]) == 2
    short = world.widths.count(2 * SHORT - 1)
    assert (len(world.widths) - short, short) == (5 + 2 * 36, 5 + 36)


def test_a_named_exit_layer_is_not_judged() -> None:
    world = World({})
    choice = choose_exit(inputs(world, exits=(6,), recent_choices=(2,), named=True))
    assert choice.plan.layers == (6, 7) and exit_of(choice) == (6, 2) and not choice.facts and not world.judged


def test_a_limit_that_no_exit_layer_keeps_names_the_best_one() -> None:
    world = World({key: dict.fromkeys(TEXTS, 0.08 * (9 - key[0])) for key in rises()})
    with pytest.raises(
        NblError, match=r"--max-perplexity-increase 4% .* 6 loses least, \+24.0% of perplexity and 24% of long-range"
    ):
        choose_exit(inputs(world, limit=Limit(0.04, "4%")))
    lost = {5: 0.2, 6: 0.3}
    world = World({key: {LONG_RANGE: lost.get(key[0], 0.9)} for key in rises()})
    with pytest.raises(NblError, match=r"5 loses least, \+0.0% of perplexity and 20% of long-range"):
        choose_exit(inputs(world))


@pytest.mark.parametrize(("layers", "exits"), [(1, ()), (2, (1,)), (24, range(12, 22)), (80, range(40, 71, 2))])
def test_candidates_stand_between_a_half_and_seven_eighths(layers: int, exits: Sequence[int]) -> None:
    assert candidate_exits(layers) == tuple(exits)


@pytest.mark.parametrize(
    ("exit_layer", "held", "collected"),
    [
        ("auto", (), range(12, 22)),
        ("auto", (14,), range(12, 22)),  # sums of a layer that was named before have no others
        ("auto", (12,), range(12, 22)),  # nor those of the lowest candidate
        ("14", range(12, 22), range(12, 22)),
        ("11", range(12, 22), (11,)),
        ("14", (), (14,)),
    ],
)
def test_a_named_exit_layer_is_fitted_to_the_sums_that_hold_it(
    exit_layer: str, held: Sequence[int], collected: Sequence[int]
) -> None:
    """They are not collected again, and those of an earlier choice serve no other one."""
    decoder = DecoderSpec("llama", 24, 64, 4, 2, 16, 100, 4096)
    known = {"exits": list(held), "length": 1024} if held else {}
    found = PredictedKVMethod().candidates(JobOptions("m", exit_layer=exit_layer), decoder, known)
    assert found.collected == Exits(tuple(collected), 1024)
    assert found.exits == (tuple(range(12, 22)) if exit_layer == "auto" else (int(exit_layer),))


def test_recent_tokens_and_rows_are_within_the_positions_of_the_model() -> None:
    decoder = DecoderSpec("llama", 24, 64, 4, 2, 16, 100, 128)
    found = PredictedKVMethod().candidates(JobOptions("m", exit_layer="auto"), decoder, {})
    assert found.recent_choices == (64,) and found.collected.length == 128


def test_rows_are_joined_in_order_and_long_ones_stay() -> None:
    assert joined(torch.arange(14).view(7, 2), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert joined(torch.arange(6).view(1, 6), 4).shape == (1, 6)
    assert joined(torch.arange(2).view(1, 2), 4).shape == (1, 2)


def test_short_windows_are_judged_joined() -> None:
    """As they are calibrated on, both to estimate and to decide: a short row has few long-range tokens or none."""
    rows = {name: torch.full((16, LENGTH // 2), TOKEN[name]) for name in (OWN, SECOND)}
    twice = torch.full((1, LENGTH), TOKEN[TWICE])
    long, short = World(rises()), World(rises())
    choose_exit(inputs(long))
    choose_exit(
        inputs(
            short,
            selection=Lazy(None, lambda: [*((name, part[:2]) for name, part in rows.items()), (TWICE, twice)]),
            validation=Lazy(None, lambda: list(rows.items())),
        )
    )
    assert short.judged == long.judged and short.widths == long.widths


def test_rows_that_decide_are_of_the_whole_text() -> None:
    assert _spread(torch.arange(14), 3).tolist() == [0, 4, 8] and _spread(torch.arange(2), 3).tolist() == [0, 1]
