"""Profiles and chunks, without any engine; and text, without any model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.targets.tensorrt.static.host import StaticRunner
from nbl_export.targets.tensorrt.static.schedule import Profile, engine_profiles, profile_for
from nbl_export.targets.tokenizer import TokenizerFiles

from ..tiny import END_IDS

pytestmark = pytest.mark.engine

VOCAB = 50

# -- profiles --------------------------------------------------------------------------------------------


def test_profiles_decode_with_one_dynamic_dimension_at_least() -> None:
    prefill, decode = engine_profiles(max_batch=1, chunk=512, cache_length=2048)
    assert prefill == Profile("prefill", (1, 1, 1), (1, 512, 512))
    assert decode == Profile("decode", (1, 1, 2), (1, 1, 1))
    assert engine_profiles(2, 512, 2048)[1].batch == (1, 2, 2)
    assert [engine_profiles(1, 512, slots)[1].tokens for slots in (24_064, 24_576)] == [(1, 1, 1), (1, 1, 2)]
    assert [p.batch for p in engine_profiles(1, 512, 2048, two_rows=True)] == [(1, 1, 2), (1, 1, 2)]
    for rows, batches in ((1, [(1, 1, 1)] * 2), (2, [(1, 2, 2)] * 2), (8, [(1, 8, 8), (1, 1, 2), (1, 8, 8)])):
        assert [p.batch for p in engine_profiles(rows, 512, 32_768, two_rows=True)] == batches


def test_one_row_of_an_engine_for_many_has_kernels_of_its_own() -> None:
    """A profile's kernels are chosen for its optimum."""
    profiles = engine_profiles(8, 512, 2048)
    assert [(p.name, p.batch, p.decodes) for p in profiles] == [
        ("prefill", (1, 8, 8), False), ("decode", (1, 1, 2), True), ("decode_batch", (1, 8, 8), True)
    ]  # fmt: skip
    assert [profile_for(profiles, rows, 1) for rows in (1, 2, 3, 8)] == [1, 1, 2, 2]
    assert {profile_for(profiles, rows, n) for rows in (1, 8) for n in (2, 512)} == {0}


@pytest.mark.parametrize(
    ("batch", "chunk", "flag"), [(0, 8, "key max_batch"), (1, 0, "key prefill_chunk"), (1, 65, "key prefill_chunk")]
)
def test_impossible_profiles_are_refused(batch: int, chunk: int, flag: str) -> None:
    with pytest.raises(NblError, match=flag):
        engine_profiles(batch, chunk, cache_length=64)


def test_the_narrowest_profile_takes_a_step() -> None:
    profiles = engine_profiles(2, 16, 64)
    assert [profile_for(profiles, 2, n) for n in (1, 2, 16)] == [1, 0, 0]
    long = engine_profiles(2, 16, 32_768)  # decode is built for 1 to 2 tokens
    assert [profile_for(long, 2, n) for n in (1, 2, 16)] == [1, 0, 0]
    with pytest.raises(NblError, match=r"3 rows of 1 tokens .* 2 rows of 16 tokens or 2 rows of 1 tokens"):
        profile_for(profiles, 3, 1)
    with pytest.raises(NblError, match="key prefill_chunk"):
        profile_for(profiles, 1, 17)


# -- the host over a session that can be checked by hand ------------------------------------------------------


class Ledger:
    """A session whose logits spell out what each token can see: a sum that depends on ids and order."""

    def __init__(self, cache_length: int, chunk: int, widths: tuple[int, ...] = ()) -> None:
        self.cache_length, self.chunk, self.widths = cache_length, chunk, widths
        self.ran: list[int] = []
        self.cache = np.zeros((0, cache_length), int)

    def begin(self, batch: int) -> None:
        self.cache = np.zeros((batch, self.cache_length), int)

    def run(self, ids_BT: np.ndarray, start: int, count: int) -> np.ndarray:
        width = ids_BT.shape[1]
        assert start + width <= self.cache_length and 0 < count <= width <= self.chunk
        self.ran.append(width)
        self.cache[:, start : start + width] = ids_BT
        return np.stack([logits_behind(row[: start + count]) for row in self.cache])[:, None]

    def close(self) -> None:
        pass


def logits_behind(prefix: Sequence[int] | np.ndarray) -> np.ndarray:
    value = 0
    for token in prefix:
        value = (31 * value + int(token) + 1) % 1009
    return (value + (np.arange(VOCAB) == value % VOCAB)).astype(np.float32)


@pytest.fixture
def runner(tmp_path: Path) -> StaticRunner:
    return over(Ledger(16, 4), tmp_path)


def over(session: Any, directory: Path) -> StaticRunner:
    return StaticRunner(session, directory)


def test_greedy_is_the_loop_by_hand(runner: StaticRunner) -> None:
    ids = [3, 4, 5, 6, 7, 8]
    said = runner.greedy(ids, 5)
    expected: list[int] = []
    for _ in range(5):
        expected.append(int(logits_behind([*ids, *expected]).argmax()))
    assert said == expected
    assert len(runner.greedy(ids, 500)) == 10  # to the last slot


def test_prefill_is_padded_to_few_widths_if_there_is_room(tmp_path: Path) -> None:
    """Then rewound and continued: what the padding wrote is never seen."""
    session = Ledger(20, 16, widths=(4, 8, 16))
    runner, row = over(session, tmp_path), [5, 6, 7, 8, 9, 3, 2, 4, 6, 8, 1, 2]
    runner.begin(20)
    done = 0
    for count, width in ((3, 4), (1, 1), (5, 8), (3, 4)):
        runner.append(row[done : done + count])
        done += count
        assert session.ran[-1] == width
        assert np.array_equal(runner.last_logits(), logits_behind(row[:done])), done
    runner.append([7] * 5)  # 12 + 8 slots
    assert session.ran[-1] == 8
    runner.append([7] * 3)  # three slots are left, not four
    assert session.ran[-1] == 3
    runner.rewind(2)
    runner.append([9, 9])
    assert session.ran[-1] == 4 and np.array_equal(runner.last_logits(), logits_behind([5, 6, 9, 9]))


def test_prompts_that_cannot_be_run_are_refused(runner: StaticRunner, tmp_path: Path) -> None:
    with pytest.raises(NblError, match="empty"):
        runner.greedy([], 3)
    with pytest.raises(NblError, match=f"16 tokens and {tmp_path} takes 16"):
        runner.greedy([1] * 16, 3)
    runner.begin(5)
    with pytest.raises(NblError, match=r"6 tokens do not fit .* room for 5 .* context is 16"):
        runner.append([1] * 6)


def test_a_session_that_does_not_close_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def close(_: Ledger) -> None:
        raise OSError("cannot close")

    monkeypatch.setattr(Ledger, "close", close)
    with pytest.raises(NblError, match="the prompt is empty"), over(Ledger(16, 4), tmp_path) as r:
        r.greedy([], 3)
    assert "does not close after an error: cannot close" in caplog.text
    with pytest.raises(OSError, match="cannot close"), over(Ledger(16, 4), tmp_path):
        pass


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_text(wrong: float) -> None:
    logits = np.array([[[0.5, wrong, 2.0]]], np.float32)
    session: Any = SimpleNamespace(
        cache_length=8, chunk=4, widths=(4,), begin=lambda _batch: None, run=lambda *_: logits
    )
    runner = StaticRunner(session, Path("engine"))
    with pytest.raises(NblError, match=r"engine gives logits that are not finite: .* --precision bf16"):
        runner.greedy([3], 2)
    logits[..., 1] = 1.0
    assert runner.greedy([3], 2) == [2, 2]


# -- text ------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}\n[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}\n[assistant]{% endif %}"
)


@pytest.fixture
def texts(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    for path in checkpoint("llama").iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, tmp_path / path.name)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_ids_are_those_of_transformers(texts: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(texts))
    ours = TokenizerFiles(texts)
    for prompt in ("The quick brown fox", "naïve 你好 ", ""):
        assert ours.encode(prompt, chat=True) == theirs(prompt)["input_ids"]
        assert ours.encode(prompt, chat=True)[0] == 0  # begin of text
    (texts / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(str(texts))
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert TokenizerFiles(texts).encode("Why?", chat=True) == chat
    assert TokenizerFiles(texts).encode("Why?", chat=False) == theirs("Why?")["input_ids"]


def test_pieces_join_to_the_text_and_stop_at_its_end(texts: Path) -> None:
    text = TokenizerFiles(texts)
    ids = text.encode("naïve 你好 words", chat=False)
    assert text.end_ids == END_IDS
    pieces = list(text.pieces([*ids, END_IDS[1], *ids]))
    assert "".join(pieces) == "naïve 你好 words"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_answer_is_what_stands_behind_its_prompt_until_the_end_of_text(texts: Path) -> None:
    text = TokenizerFiles(texts)
    prompt, answer = (text.encode(part, chat=False) for part in ("naïve 你", "好 words"))
    assert text.whole([*prompt, END_IDS[0], *prompt]) == "naïve 你" * 2  # a prompt may hold the end of another text
    assert text.behind(prompt, [*answer, END_IDS[0], *answer]) == "好 words"


def test_the_template_of_the_settings_is_used_and_a_bad_one_named(texts: Path) -> None:
    path = texts / "tokenizer_config.json"
    settings_ = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings_, "chat_template": "<{{ messages[0]['content'] }}>"}), encoding="utf-8")
    text = TokenizerFiles(texts)
    assert "".join(text.pieces(text.encode("Why", chat=True))) == "<Why>"
    path.write_text(json.dumps({**settings_, "chat_template": "{% if %}"}), encoding="utf-8")
    with pytest.raises(NblError, match=r"chat template .*--raw"):
        TokenizerFiles(texts).encode("Why", chat=True)


def test_generation_config_knows_better_which_ids_end_a_text(texts: Path) -> None:
    (texts / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', encoding="utf-8")
    assert TokenizerFiles(texts).end_ids == (7, 8)
    (texts / "generation_config.json").write_text('{"eos_token_id": {"7": 8}}', encoding="utf-8")
    with pytest.raises(NblError, match="has an eos_token_id that is no number of a token"):
        TokenizerFiles(texts)
    (texts / "generation_config.json").unlink()
    (texts / "config.json").unlink()
    assert TokenizerFiles(texts).end_ids == ()


def test_a_damaged_tokenizer_is_named(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(NblError, match=r"tokenizer_config\.json cannot be read"):
        TokenizerFiles(texts)
    (texts / "tokenizer.json").unlink()
    with pytest.raises(NblError, match="tokenizer of"):
        TokenizerFiles(texts)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match="tokenizers"):
        TokenizerFiles(texts)
