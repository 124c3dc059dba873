"""What a job's verification runs: rows and prompts of which tokens stop at an exit layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.records.inputs import Lazy
from nbl_export.run.stages.verify import ask, loss_texts, make_probe
from nbl_export.targets.tokenizer import TokenizerFiles
from nbl_export.text.questions import PASSAGE, QUESTIONS
from nbl_export.verify.ladder import DECODE_STEPS, Probe
from nbl_export.verify.last_token import BATCH_LENGTHS


def made(recent_tokens: int | None, held_out: int = 1000, cache_length: int = 4096) -> Probe:
    inputs: Any = SimpleNamespace(
        windows=Lazy("", lambda: torch.arange(5000, 6000).view(2, 500)),
        held_out=Lazy("", lambda: torch.arange(held_out).view(1, -1)),
        cache_length=cache_length,
        spec=SimpleNamespace(sliding_window=None),
    )
    probe: Probe = make_probe(inputs, recent_tokens)
    return probe


@pytest.mark.parametrize(("recent_tokens", "held_out"), [(1, 1000), (64, 1000), (128, 300), (256, 300)])
def test_rows_and_prompts_exceed_the_recent_tokens(recent_tokens: int, held_out: int) -> None:
    probe = made(recent_tokens, held_out)
    first, second = (len(row) - DECODE_STEPS for row in probe.rows)
    assert first > second == recent_tokens + 2 and all(len(prompt) > recent_tokens + 1 for prompt in probe.prompts)
    assert [len(row) - DECODE_STEPS for row in probe.continuing] == [first, recent_tokens + 1]
    assert len(probe.rows[0]) >= recent_tokens + max(BATCH_LENGTHS) + len(BATCH_LENGTHS) + 2  # what `check_last` reads


def test_a_plan_without_an_exit_layer_has_short_rows() -> None:
    probe = made(None)
    assert [len(row) for row in probe.rows] == [64 + DECODE_STEPS, 37 + DECODE_STEPS] and not probe.continuing
    assert {len(prompt) for prompt in probe.prompts} == {24}


@pytest.mark.parametrize(
    ("recent_tokens", "cache_length", "length"), [(None, 4096, 512), (64, 4096, 1024), (64, 600, 600)]
)
def test_windows_of_the_quality_loss_are_long_if_prompts_stop(
    recent_tokens: int | None, cache_length: int, length: int
) -> None:
    """Most of their prompt is far."""
    test = Lazy("", lambda: [("text", torch.arange(4096).view(8, 512))])
    inputs: Any = SimpleNamespace(context=512, cache_length=cache_length, test=test)
    ((_, windows),) = loss_texts(inputs, recent_tokens)
    assert windows.shape == (4096 // length, length) and windows[0].tolist() == list(range(length))


def test_a_short_text_is_one_window() -> None:
    test = Lazy("", lambda: [("text", torch.arange(384).view(3, 128))])
    inputs: Any = SimpleNamespace(context=128, cache_length=4096, test=test)
    ((_, windows),) = loss_texts(inputs, 64)
    assert windows.shape == (1, 384)


def test_a_model_with_a_chat_template_is_asked_questions(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    assert ask(folder, 0, 4096) == ask(None, 0, 4096) == ()
    template = folder / "chat_template.jinja"
    template.write_text("user {{ messages[0].content }} end", encoding="utf-8")
    asked, text = ask(folder, 16, 4096), TokenizerFiles(folder)
    turns = [f"user {PASSAGE}\n\n{question} end" for question in QUESTIONS]
    assert list(asked) == [tuple(text.encode(turn, chat=False)) for turn in turns]
    most = max(map(len, asked))
    assert ask(folder, min(map(len, asked)), 4096) == ()  # computed as in the original
    assert ask(folder, 0, most) == () and ask(folder, 0, most + 48) == asked
    template.write_text("{{ raise_exception('no') }}", encoding="utf-8")
    assert ask(folder, 0, 4096) == ()
