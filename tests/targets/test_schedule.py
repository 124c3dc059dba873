"""Chunks, slots, rows and profiles, without any engine; and text, without any model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.records.decoder import GraphContract, TensorInfo
from nbl_export.targets.tensorrt.static.host import StaticDecoder, StaticRunner
from nbl_export.targets.tensorrt.static.schedule import Profile, Rows, Step, engine_profiles, plan_steps, profile_for
from nbl_export.targets.tokenizer import Text

from ..tiny import END_IDS

VOCAB = 50

# -- steps -----------------------------------------------------------------------------------------------


def test_a_prompt_runs_in_few_chunks_beside_rows_that_rest() -> None:
    def steps(lengths: list[int], counts: list[int], chunk: int) -> list[Step]:
        return list(plan_steps(lengths, counts, cache_length=32, chunk=chunk))

    assert steps([3], [10], 4) == [Step(0, 4, (3,), (4,)), Step(4, 4, (7,), (4,)), Step(8, 2, (11,), (2,))]
    assert steps([0, 5], [6, 2], 4) == [Step(0, 4, (0, 5), (4, 2)), Step(4, 2, (4, 7), (2, 0))]
    assert [step.width for step in steps([29, 0], [0, 7], 8)] == [3, 3, 1]  # a resting row near its end
    assert steps([32, 0], [0, 5], 8) == [Step(0, 5, (27, 0), (0, 5))]  # padding over the end of a full row


@pytest.mark.parametrize(("lengths", "counts", "row"), [([30], [3], 0), ([0, 32], [1, 1], 1)])
def test_more_tokens_than_slots_are_refused(lengths: list[int], counts: list[int], row: int) -> None:
    with pytest.raises(NblError, match=f"row {row}: {lengths[row]} tokens are cached and {counts[row]} more"):
        plan_steps(lengths, counts, cache_length=32, chunk=8)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], int, int]:
    cache_length = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.integers(0, cache_length), min_size=1, max_size=4))
    counts = [draw(st.integers(0, cache_length - length)) for length in lengths]
    return lengths, counts, cache_length, draw(st.integers(1, 50))


@given(batches())
@settings(max_examples=300, deadline=None)
def test_every_token_is_written_once_where_it_stands_and_nothing_is_lost(
    batch: tuple[list[int], list[int], int, int],
) -> None:
    lengths, counts, cache_length, chunk = batch
    cache = [["old"] * n + ["free"] * (cache_length - n) for n in lengths]
    done = [0] * len(lengths)
    for step in plan_steps(lengths, counts, cache_length, chunk):
        assert 1 <= step.width <= chunk
        for row, (at, count) in enumerate(zip(step.writes, step.counts, strict=True)):
            assert 0 <= at <= cache_length - step.width
            full = lengths[row] + done[row] == cache_length
            assert at == lengths[row] + done[row] or (full and count == 0)
            for t in range(step.width):
                if full:  # nothing follows in it
                    continue
                cache[row][at + t] = f"{step.start + t}" if t < count else "free"
            assert count == max(0, min(step.width, counts[row] - step.start))
            done[row] += count
    assert done == counts
    for row, length in enumerate(lengths):
        assert cache[row][: length + counts[row]] == ["old"] * length + [str(k) for k in range(counts[row])]


def test_rows_keep_their_lengths_and_equal_ones_can_be_cut() -> None:
    rows = Rows(2, cache_length=8, chunk=4)
    for step in rows.plan([5, 2]):
        rows.advance(step)
    assert rows.lengths == [5, 2]
    with pytest.raises(ValueError, match="rewind"):
        rows.rewind(1)
    for step in rows.plan([0, 3]):
        rows.advance(step)
    with pytest.raises(ValueError, match="rewind"):
        rows.rewind(1)  # of one length now, and padding has been written
    one = Rows(1, cache_length=8, chunk=8)
    for step in one.plan([5]):
        one.advance(step)
    one.rewind(3)
    assert one.lengths == [3]
    with pytest.raises(ValueError, match="rewind"):
        one.rewind(4)


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

    def __init__(self, cache_length: int, chunk: int, *, last_only: bool, widths: tuple[int, ...] = ()) -> None:
        self.cache_length, self.chunk, self.last_only, self.widths = cache_length, chunk, last_only, widths
        names = ["input_ids", "write_indices", *(["num_tokens"] if last_only else [])]
        inputs = tuple(TensorInfo(n, "int64", ("batch",)) for n in names)
        logits = TensorInfo("logits", "float32", ("batch", 1 if last_only else "tokens", VOCAB))
        self.contract = GraphContract(inputs, (logits,), (0,))
        self.ran: list[int] = []
        self.closed = False
        self.cache = np.zeros((0, cache_length), int)

    @property
    def cache_bytes(self) -> int:
        return self.cache.nbytes

    def begin(self, batch: int) -> None:
        self.cache = np.zeros((batch, self.cache_length), int)

    def run(self, ids_BT: np.ndarray, writes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        self.ran.append(ids_BT.shape[1])
        logits = np.zeros((*ids_BT.shape, VOCAB), np.float32)
        for b, at in enumerate(writes):
            self.cache[b, at : at + ids_BT.shape[1]] = ids_BT[b]
            for t in range(ids_BT.shape[1]):
                logits[b, t] = said_of(self.cache[b, : at + t + 1])
        if not self.last_only:
            return logits
        return logits[np.arange(len(ids_BT)), np.maximum(np.array(counts) - 1, 0)][:, None]

    def close(self) -> None:
        self.closed = True


def said_of(prefix: Sequence[int] | np.ndarray) -> np.ndarray:
    value = 0
    for token in prefix:
        value = (31 * value + int(token) + 1) % 1009
    return (value + (np.arange(VOCAB) == value % VOCAB)).astype(np.float32)


@pytest.mark.parametrize(("last_only", "widths"), [(False, ()), (True, ()), (True, (4, 8))])
@pytest.mark.parametrize("chunk", [1, 3, 24])
def test_a_ragged_batch_sees_what_each_row_alone_would(chunk: int, last_only: bool, widths: tuple[int, ...]) -> None:
    session = Ledger(24, chunk, last_only=last_only, widths=widths)
    decoder = StaticDecoder(session)
    decoder.begin(3)
    rng = np.random.default_rng(0)
    rows: list[list[int]] = [[], [], []]
    for taken in [(7, 3, 1), (1, 1, 1), (0, 9, 2), (2, 0, 0), (14, 11, 20)]:
        ids, valid = rng.integers(2, VOCAB, (3, max(taken))), np.zeros((3, max(taken)), int)
        for b, n in enumerate(taken):
            valid[b, :n] = 1
            rows[b] += ids[b, :n].tolist()
        with pytest.raises(NblError, match="do not fit"):  # before anything runs
            decoder.step(np.ones((3, 25), int))
        logits = decoder.step(ids, valid)
        assert logits.shape == (3, 1 if last_only else max(taken), VOCAB)
        for b, n in enumerate(taken):
            for k in range(n if not last_only else min(n, 1)):
                expected = said_of(rows[b] if last_only else rows[b][: len(rows[b]) - n + k + 1])
                assert np.array_equal(logits[b, k], expected), (taken, b, k)
    assert decoder.lengths == (24, 24, 24)
    assert max(session.ran) <= chunk
    with pytest.raises(NblError, match="do not fit"):
        decoder.step(np.ones((3, 1), int))


def test_padding_has_to_stand_on_the_right() -> None:
    decoder = StaticDecoder(Ledger(8, 4, last_only=True))
    decoder.begin(1)
    with pytest.raises(ValueError, match="right"):
        decoder.step(np.ones((1, 2), int), np.array([[0, 1]]))
    with pytest.raises(NblError, match="no tokens"):
        decoder.step(np.ones((1, 2), int), np.array([[0, 0]]))


@pytest.fixture
def runner(tmp_path: Path) -> StaticRunner:
    return StaticRunner(Ledger(16, 4, last_only=True), tmp_path)


def test_greedy_is_the_loop_by_hand(runner: StaticRunner) -> None:
    ids = [3, 4, 5, 6, 7, 8]
    said = runner.greedy(ids, 5)
    expected: list[int] = []
    for _ in range(5):
        expected.append(int(said_of([*ids, *expected]).argmax()))
    assert said == expected
    assert len(runner.greedy(ids, 500)) == 10  # to the last slot


def test_prefill_is_padded_to_few_widths_if_there_is_room(tmp_path: Path) -> None:
    """Then rewound and continued: what the padding wrote is never seen."""
    session = Ledger(20, 16, last_only=True, widths=(4, 8, 16))
    runner, row = StaticRunner(session, tmp_path), [5, 6, 7, 8, 9, 3, 2, 4, 6, 8, 1, 2]
    runner.begin(20)
    done = 0
    for count, width in ((3, 4), (1, 1), (5, 8), (3, 4)):
        runner.append(row[done : done + count])
        done += count
        assert session.ran[-1] == width
        assert np.array_equal(runner.last_logits(), said_of(row[:done])), done
    runner.append([7] * 5)  # 12 + 8 slots
    assert session.ran[-1] == 8
    runner.append([7] * 3)  # three slots are left, not four
    assert session.ran[-1] == 3
    runner.rewind(2)
    runner.append([9, 9])
    assert session.ran[-1] == 4 and np.array_equal(runner.last_logits(), said_of([5, 6, 9, 9]))


def test_prompts_that_cannot_be_run_are_refused(runner: StaticRunner, tmp_path: Path) -> None:
    with pytest.raises(NblError, match="empty"):
        runner.greedy([], 3)
    with pytest.raises(NblError, match=f"16 tokens and {tmp_path} takes 16"):
        runner.greedy([1] * 16, 3)
    runner.begin(5)
    with pytest.raises(NblError, match=r"6 tokens do not fit .* room for 5 .* context is 16"):
        runner.append([1] * 6)


def test_a_batch_is_its_rows_alone_and_can_be_rewound(runner: Any) -> None:
    """As the benchmark runs it: rows of one length, in chunks of four."""
    rows = np.array([[5, 6, 7, 8, 9, 3], [2, 9, 4, 4, 8, 1]])
    runner.begin(16, 2)
    runner.append(rows)
    for length, more in ((4, [[1], [7]]), (2, [[8, 8], [3, 2]])):
        runner.rewind(length)
        runner.append(more)
        kept = [[*row[:length], *new] for row, new in zip(rows.tolist(), more, strict=True)]
        assert runner.pick() == int(said_of(kept[0]).argmax())
        assert runner._session.cache[:, : len(kept[0])].tolist() == kept
        rows = np.array(kept)


def test_a_session_that_does_not_close_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def close(_: Ledger) -> None:
        raise OSError("cannot close")

    monkeypatch.setattr(Ledger, "close", close)
    with (
        pytest.raises(NblError, match="the prompt is empty"),
        StaticRunner(Ledger(16, 4, last_only=True), tmp_path) as r,
    ):
        r.greedy([], 3)
    assert "does not close after an error: cannot close" in caplog.text
    with pytest.raises(OSError, match="cannot close"), StaticRunner(Ledger(16, 4, last_only=True), tmp_path):
        pass


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_no_text(wrong: float) -> None:
    logits = np.array([[[0.5, wrong, 2.0]]], np.float32)
    session: Any = SimpleNamespace(
        cache_length=8, chunk=4, widths=(4,), contract=SimpleNamespace(inputs=()), begin=lambda _batch: None,
        run=lambda *_: logits,
    )  # fmt: skip
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
    ours = Text(texts)
    for prompt in ("The quick brown fox", "naïve 你好 ", ""):
        assert ours.encode(prompt, chat=True) == theirs(prompt)["input_ids"]
        assert ours.encode(prompt, chat=True)[0] == 0  # begin of text
    (texts / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(str(texts))
    chat = theirs.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert Text(texts).encode("Why?", chat=True) == chat
    assert Text(texts).encode("Why?", chat=False) == theirs("Why?")["input_ids"]


def test_pieces_join_to_the_text_and_stop_at_its_end(texts: Path) -> None:
    text = Text(texts)
    ids = text.encode("naïve 你好 words", chat=False)
    assert text.end_ids == END_IDS
    pieces = list(text.pieces([*ids, END_IDS[1], *ids]))
    assert "".join(pieces) == "naïve 你好 words"
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_answer_is_what_stands_behind_its_prompt_until_the_end_of_text(texts: Path) -> None:
    text = Text(texts)
    prompt, answer = (text.encode(part, chat=False) for part in ("naïve 你", "好 words"))
    assert text.whole([*prompt, END_IDS[0], *prompt]) == "naïve 你" * 2  # a prompt may hold the end of another text
    assert text.behind(prompt, [*answer, END_IDS[0], *answer]) == "好 words"


def test_the_template_of_the_settings_is_used_and_a_bad_one_named(texts: Path) -> None:
    path = texts / "tokenizer_config.json"
    settings_ = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings_, "chat_template": "<{{ messages[0]['content'] }}>"}), encoding="utf-8")
    text = Text(texts)
    assert "".join(text.pieces(text.encode("Why", chat=True))) == "<Why>"
    path.write_text(json.dumps({**settings_, "chat_template": "{% if %}"}), encoding="utf-8")
    with pytest.raises(NblError, match=r"chat template .*--raw"):
        Text(texts).encode("Why", chat=True)


def test_generation_config_knows_better_which_ids_end_a_text(texts: Path) -> None:
    (texts / "generation_config.json").write_text('{"eos_token_id": [7, 8]}', encoding="utf-8")
    assert Text(texts).end_ids == (7, 8)
    (texts / "generation_config.json").write_text('{"eos_token_id": {"7": 8}}', encoding="utf-8")
    with pytest.raises(NblError, match="has an eos_token_id that is no number of a token"):
        Text(texts)
    (texts / "generation_config.json").unlink()
    (texts / "config.json").unlink()
    assert Text(texts).end_ids == ()


def test_a_damaged_tokenizer_is_named(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (texts / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(NblError, match=r"tokenizer_config\.json cannot be read"):
        Text(texts)
    (texts / "tokenizer.json").unlink()
    with pytest.raises(NblError, match="tokenizer of"):
        Text(texts)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingPackageError, match="tokenizers"):
        Text(texts)
