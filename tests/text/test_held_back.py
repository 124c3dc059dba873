"""A window of text has one use: by position, for default and short texts, and in what stages read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.methods.choose import steps_of_sets
from nbl_export.methods.linear.order import Selection, quiet
from nbl_export.run.stages import plan as plan_stage
from nbl_export.run.stages import verify
from nbl_export.run.stages.common import StageContext
from nbl_export.run.stages.plan import choice_of
from nbl_export.run_directory import TEXT_FILE
from nbl_export.text import corpus, parts
from nbl_export.text import windows as text_windows
from nbl_export.text.parts import split_rows, split_second
from nbl_export.text.windows import CALIBRATION_ROLES, SECOND_ROLES, divide, part_tokens

from ..command import nbl
from ..jobs import opened

pytestmark = pytest.mark.job

PARTS = ("validation", "selection", "test")


@pytest.fixture(autouse=True)
def whole_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user's job."""
    monkeypatch.setattr(text_windows, "PART_TOKENS", {CALIBRATION_ROLES: 4096, SECOND_ROLES: 8192})


def counting(tokens: int) -> tuple[Any, Any]:
    """A text whose k-th token is k, and its tokenizer."""

    def tokenizer(piece: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in piece.split()]}

    size = 1000
    documents = [" ".join(map(str, range(k, min(tokens, k + size)))) for k in range(0, tokens, size)]
    return corpus.Corpus("counted", "0", tuple(documents)), tokenizer


def positions(windows: Any) -> set[int]:
    return set(torch.as_tensor(windows).flatten().tolist())


@pytest.mark.parametrize("context", [64, 384, 512, 2048])
@pytest.mark.parametrize("tokens", [9_000, 30_000, 70_000, 100_000, 400_000])
def test_calibration_training_judging_deciding_and_figures_share_no_token(tokens: int, context: int) -> None:
    text, tokenizer = counting(tokens)
    found = {
        part: positions(rows) for part, rows in split_rows(text, tokenizer, 65_536, context, 262_144, tokens).items()
    }
    uses = {part: found[part] for part in (*PARTS, "training")}
    assert found["windows"] <= uses["training"]
    assert found["held_out"] == set().union(*(uses[part] for part in PARTS))
    assert all(uses.values())
    assert sum(map(len, uses.values())) == len(set().union(*uses.values()))
    if tokens == 400_000:
        assert len(uses["test"]) >= 8192 and len(uses["validation"]) >= 16_384 and len(uses["selection"]) >= 4096
        assert len(uses["training"]) == 262_144 // context * context


def test_parts_of_the_other_text_share_no_token_either() -> None:
    for context in (64, 512, 2048):
        text, tokenizer = counting(160_000)
        uses = {part: positions(rows) for part, rows in split_second(text, tokenizer, context, 160_000).items()}
        assert set(uses) == {f"second.{part}" for part in PARTS}
        assert all(len(found) >= 8192 for found in uses.values())
        assert sum(map(len, uses.values())) == len(set().union(*uses.values()))
        assert min(set().union(*uses.values())) >= 8192  # what the defaults were tried on


def test_a_text_that_is_too_short_for_every_use_is_refused() -> None:
    text, tokenizer = counting(4 * 64 - 1)
    with pytest.raises(corpus.NblError, match="255 tokens, 256 are needed"):
        text_windows.pack(text, tokenizer, 1000, 64, part_tokens(CALIBRATION_ROLES, 64))
    text, tokenizer = counting(4 * 64)
    calibration, held = text_windows.pack(text, tokenizer, 1000, 64, part_tokens(CALIBRATION_ROLES, 64))
    division = divide(held, CALIBRATION_ROLES)
    assert (len(calibration), *(len(division[part]) for part in PARTS)) == (1, 1, 1, 1)


def test_stages_read_the_parts_that_are_theirs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(run, select="efficient")
    own_rows, second = (
        SimpleNamespace(**{part: parts.read(run / TEXT_FILE, f"{text}{part}") for part in PARTS})
        for text in ("", "second.")
    )
    seen: dict[str, Any] = {}

    class SeenError(Exception):
        pass

    def judge(_switched: Any, texts: Any, **_given: Any) -> Any:
        seen["selection"] = texts
        raise SeenError

    monkeypatch.setattr("nbl_export.methods.linear.order.Judge", judge)
    with pytest.raises(SeenError):
        Selection(choice_of(job)).order(1)

    def rows(windows: Any) -> set[tuple[int, ...]]:
        return {tuple(row) for row in windows.tolist()}

    own, others, twice = seen["selection"]
    assert rows(own) <= rows(own_rows.selection) and rows(others) <= rows(second.selection)
    passages, again = torch.as_tensor(twice).view(2, -1, min(64, twice.numel() // 2))
    assert torch.equal(passages.flip(0), again)  # a layer that copies long-range tokens is seen
    assert passages.flatten().tolist() == own_rows.selection.flatten()[: passages.numel()].tolist()
    final = [windows for _, windows in verify.loss_texts(verify.declare(job))]
    assert rows(final[0]) == rows(own_rows.test) and rows(final[1]) == rows(second.test)
    assert final[1].size == final[0].size == 4 * 2048  # shorten_parts; looks

    class Recorder:
        @property
        def partial(self) -> Recorder:
            return self

        def order(self, count: int) -> tuple[int, ...]:
            return (*range(count),)

        def window_losses(self, windows: Any, partial: Any, _progress: Any) -> Any:
            seen.setdefault("validation", []).append(windows)
            loss = SimpleNamespace(positions=1, original_sum=1.0, nbl_sum=1.0, kl_sum=0.0)
            return {name: [loss, loss] for name in partial}

    recorder: Any = Recorder()
    steps_of_sets(recorder.partial, job.text.validation.value, [recorder.order(1)], 0.1, quiet)
    assert [rows(w) for w in seen["validation"]] == [rows(own_rows.validation), rows(second.validation)]


def test_distilled_maps_are_judged_by_the_choosing_part(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    job = opened(run, fit="distilled")
    inputs = plan_stage.declare_distill(job)
    assert isinstance(inputs, plan_stage.DistillInputs)
    shutil.copy(run / "maps.safetensors", run / "start.safetensors")

    class SeenError(Exception):
        pass

    def distill(_model: Any, _start: Any, _tap: str, windows_WT: Any, held_WT: Any, *_: Any) -> None:
        raise SeenError(windows_WT, held_WT)

    monkeypatch.setattr("nbl_export.methods.distill.training.distill", distill)
    with pytest.raises(SeenError) as seen:
        plan_stage.run_distill(inputs, StageContext(job.run, job.ui), run)
    windows, early_stopping = seen.value.args
    assert early_stopping.tolist() == parts.read(run / TEXT_FILE, "selection").tolist()
    assert windows.tolist() == parts.read(run / TEXT_FILE, "training").tolist()


def test_a_run_says_what_it_read_for_what(run: Path) -> None:
    import json

    texts = json.loads((run / "verify.json").read_text())["texts"]
    uses = [(t["use"], t["tokens"]) for t in texts]
    assert ("calibration: scores and maps", 1024) in uses
    assert [tokens for use, tokens in uses if use == "choice of layers"] == [1024, 1024, 512]  # shorten_parts
    assert [tokens for use, tokens in uses if use == "final figures, at most"] == [8192, 8192]
    assert "distillation: judging" not in dict(uses) and "number of layers" not in dict(uses)
    done = nbl("verify", run, "--json")
    assert done.status == 0 and json.loads(done.out)["texts"] == texts


def test_a_tested_count_is_a_use_of_the_text_also_without_a_goal(run: Path) -> None:
    job = opened(run)
    job.run.manifest["goal"] = {"max_perplexity_increase": "10%", "default": True, "path": [{"layers": 1}]}
    uses = verify.uses_of(verify.declare(job), StageContext(job.run, job.ui))
    assert [u["tokens"] for u in uses if u["use"] == "number of layers"] == [4096, 4096]
