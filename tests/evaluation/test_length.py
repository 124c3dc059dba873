"""Quality at length: the parts of a window, keys and copies, the warning, and `eval --long-context` on a tiny run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.evaluation import length
from nbl_export.evaluation.length import run_length
from nbl_export.evaluation.measure import Metric, Outcome, run_windows
from nbl_export.evaluation.results import entry, summarize
from nbl_export.evaluation.scorer import GraphScorer, Request, TokenScores
from nbl_export.records.quality import grows_with_length
from nbl_export.records.requests import Subject
from nbl_export.text.corpus import Corpus
from nbl_export.verify.ladder import TOLERANCES

from ..command import in_new_process, nbl

pytestmark = [pytest.mark.job, pytest.mark.process]

LIMIT = 2 * TOLERANCES["fp32"].limit
WINDOW = 1024


class Letters:
    """A tokenizer with a token for each character, two of them special."""

    all_special_ids = (0, 1)
    added_tokens_decoder = {2: "<added>"}  # noqa: RUF012

    def __len__(self) -> int:
        return 128

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


class Spy(GraphScorer):
    """A model whose loss of a token is its position in the window, and that is wrong about every fourth token."""

    tokenizer = Letters()

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def token_scores(self, request: Request) -> TokenScores:
        self.requests.append(request)
        places = np.arange(len(request.context), len(request.context) + len(request.continuation))
        return TokenScores(-places.astype(float), places % 4 > 0)


def measured(test: str, limit: int | None = None, window: int = WINDOW, letters: int = 4 * WINDOW) -> tuple[Any, Spy]:
    spy = Spy()
    text = Corpus("a", "0", ("abcdefgh" * (letters // 8),))
    return run_length(test, text, spy, window, limit, lambda _done, _total: None), spy


def test_each_part_has_the_loss_of_its_positions() -> None:
    found, spy = measured("position")
    assert found.items == 4 and len(spy.requests) == 4
    means = {name: metric.value for name, metric in found.metrics.items() if name.startswith("loss")}
    parts = {128: (1, 127), 256: (128, 255), 512: (256, 511), 1024: (512, 1023)}
    assert means == {f"loss {end}": (first + last) / 2 for end, (first, last) in parts.items()}
    assert found.metrics["correct 512"].value == 0.75
    assert {len(r.context) + len(r.continuation) for r in spy.requests} == {WINDOW}


def test_a_window_of_another_length_ends_with_a_shorter_part() -> None:
    found, _ = measured("position", limit=1, window=300)
    assert found.metrics["loss 300"].value == (256 + 299) / 2


def test_behind_a_prompt_its_tokens_are_not_scored() -> None:
    spy, text = Spy(), Corpus("a", "0", ("abcdefgh" * WINDOW,))
    found = run_length("position", text, spy, WINDOW, 1, lambda *_: None, behind_prompt=True)
    assert found.metrics["loss 1024"].value == (512 + 1023) / 2 and len(found.metrics) == 2
    assert len(spy.requests[0].context) == 512
    whole = run_windows([list(range(64))], spy, lambda *_: None, prompt=32)
    assert whole.metrics["token_perplexity"].value == pytest.approx(np.exp((32 + 63) / 2))


def test_a_key_is_in_the_first_half_and_only_its_digits_are_scored() -> None:
    found, spy = measured("retrieval")
    texts = ["".join(map(chr, r.context)) for r in spy.requests]
    keys = ["".join(map(chr, r.continuation)) for r in spy.requests]
    assert [len(t) + len(k) for t, k in zip(texts, keys, strict=True)] == [512] * 8 + [WINDOW] * 8
    assert all(len(key) == 5 and key.isdigit() for key in keys) and len(set(keys)) == 16
    places = [text.index(f"The pass key is {key}.") / len(text) for text, key in zip(texts, keys, strict=True)]
    assert min(places) < 0.1 and max(places) <= 0.5
    assert [text.count(key) for text, key in zip(texts, keys, strict=True)] == [2] * 16
    assert all(text.endswith("The pass key is ") for text in texts)
    assert found.metrics["correct 512"].value == 0.0  # one digit of five is wrong, so the key is
    again, _ = measured("retrieval")
    assert again.metrics == found.metrics


@pytest.mark.parametrize(("limit", "items"), [(3, 3), (None, 8), (16, 16), (500, 16)])
def test_the_second_half_of_a_copy_is_the_first(limit: int | None, items: int) -> None:
    found, spy = measured("copying", limit=limit)
    assert found.items == items and len(spy.requests) == 2 * items
    for request in spy.requests:
        ids = request.context + request.continuation
        half = len(ids) // 2
        assert ids[:half] == ids[half:] and len(request.continuation) == half - 1
        assert min(ids) > 2 and max(ids) < 128 and len(set(ids)) > 64
    assert len({r.context for r in spy.requests}) == 2 * items


def test_a_window_without_room_for_a_key_is_refused() -> None:
    with pytest.raises(NblError, match="no room for text and a pass key"):
        measured("retrieval", window=128)


NOISE = 0.02 * np.array([1, -1, 2, -2, 1, -1, 0, 0])


@pytest.mark.parametrize(
    ("short", "long", "warned"),
    [
        (0.1 + NOISE, 0.3 + NOISE, True),
        (0.1 + NOISE, 0.15 + NOISE, False),  # more, but not twice
        (0.1 + NOISE, 0.21 + 5 * NOISE, False),  # twice, by noise
        (0.001 + 0 * NOISE, 0.03 + NOISE, False),  # too little to notice
        (np.array([0.1]), np.array([0.5]), False),  # one window has no interval
        (0.1 + NOISE, np.full(8, np.nan), False),
    ],
)
def test_a_warning_needs_twice_the_loss_beyond_noise(short: np.ndarray, long: np.ndarray, warned: bool) -> None:
    assert grows_with_length(short, long) == warned


def entries(test: str, short: float, long: float) -> dict[str, Any]:
    """Entries of the original and of a model whose loss and failures grow by these shares."""
    found = {}
    for variant, scale in (("original", 0.0), ("nbl", 1.0)):
        metrics = {}
        for end, rise in ((512, short), (4096, long)):
            losses, shares = [2.0 + scale * (rise + n) for n in NOISE], [1.0 - scale * rise] * len(NOISE)
            metrics[f"loss {end}"] = Metric.of("mean", losses, higher_is_better=False)
            metrics[f"correct {end}"] = Metric.of("mean", shares, higher_is_better=True)
        task = test if test == "copying" else f"{test}:wiki"
        subject = Subject(task, None, None, {}, {"output_type": test})
        found[variant] = entry(variant, subject, variant, Outcome(len(NOISE), metrics))
    return found


@pytest.mark.parametrize(
    ("test", "parts"),
    [
        ("position", ("on wiki, perplexity rises by +11%", "+35%", "from 512 on")),
        ("retrieval", ("on wiki, retrieval is correct in 70% instead of the original's 100% in 4,096 tokens", "90%")),
        ("copying", ("length: copying is correct in 70%",)),
    ],
)
def test_a_warning_says_what_is_lost(test: str, parts: tuple[str, ...]) -> None:
    ((warning,),) = (one["warnings"] for one in summarize(entries(test, 0.1, 0.3))["length"])
    assert all(part in warning for part in parts), warning
    assert summarize(entries(test, 0.1, 0.15))["length"][0]["warnings"] == []


@pytest.fixture(scope="module")
def evaluated(finished: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with quality at length. Never write to it."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("long") / "run"))
    no_harness = "sys.modules['lm_eval'] = None"
    asked = ("--long-context", f"held={text}", "--limit", 2)
    done = in_new_process("eval", run, *asked, code=no_harness)
    assert done.status == 0, done.err
    assert "Loss by position" in done.out and "256–511" in done.out and "retrieval:held" in done.out
    return run


def read(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "eval.json").read_text())
    return value


def test_eval_json_has_each_test_with_paired_differences(evaluated: Path) -> None:
    value = read(evaluated)
    assert value["table"] == []
    found = {one["task"]: one for one in value["length"]}
    assert set(found) == {"position:held", "retrieval:held", "copying"}
    rows = found["position:held"]["rows"]
    assert [row["tokens"] for row in rows] == [128, 256, 512]
    (graphs,) = rows[1]["differences"]
    losses = {variant: figure["loss"] for variant, figure in rows[1]["figures"].items()}
    assert graphs["loss"] == pytest.approx(losses["nbl"] - losses["original"], abs=1e-6)
    assert graphs["increase_interval"][0] < graphs["increase"] < graphs["increase_interval"][1]


def test_the_report_and_a_second_command_use_it(evaluated: Path, text: Path, tmp_path: Path) -> None:
    page = (evaluated / "report.md").read_text()
    assert "### Quality at length" in page and "| held | 128–255 |" in page and "Benchmarks" not in page
    run = Path(shutil.copytree(evaluated, tmp_path / "run"))
    again = nbl("eval", run, "--long-context", f"held={text}", "--limit", 2)
    assert again.status == 0 and "evaluate: reused" in again.err
    more = nbl("eval", run, "--long-context", f"held={text}", "--limit", 2, "--ppl-context", 480)
    assert more.status == 0, more.err
    assert [row["tokens"] for row in read(run)["length"][-3]["rows"]] == [128, 256, 480]
    assert len(read(run)["results"]) == 6 + 6


def test_an_interrupted_evaluation_goes_on_and_updates_the_report(
    finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    words = ("eval", run, "--long-context", f"held={text}", "--limit", 1)

    def interrupted(test: str, *rest: Any, **more: Any) -> Any:
        if test == "retrieval":
            raise KeyboardInterrupt
        return run_length(test, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(length, "run_length", interrupted)
        assert nbl(*words).status == 130
    assert [one["task"] for one in read(run)["length"]] == ["position:held"]
    done = nbl(*words)
    assert done.status == 0, done.err
    assert "original: position:held" not in done.err and "retrieval:held: loss" in done.err
    assert "### Quality at length" in (run / "report.md").read_text()
