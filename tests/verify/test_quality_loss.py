"""Quality loss: figures and intervals of windows, and when the user is told that it is not the same everywhere."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import NblError
from nbl_export.model import memory
from nbl_export.records.quality import increase_interval, warn_of_text
from nbl_export.report.page import render
from nbl_export.run.stages import verify
from nbl_export.text.windows import TWICE
from nbl_export.verify import perplexity
from nbl_export.verify.perplexity import quality_loss
from tests.report.test_report import BENCH, MANIFEST, VERIFY


def rows(*increases: float) -> list[dict[str, object]]:
    return [
        {"text": f"text {k}", "increase": increase, "increase_interval": None, "kl_mean": 0.1, "kl_interval": None,
         "top1_agreement": 0.9, "top1_interval": None}
        for k, increase in enumerate(increases)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "increases", [(), (0.5,), (0.5, 0.5), (0.3, 0.59), (0.6, 0.31), (0.001, 0.04), (-0.01, 0.049), (-0.1, -0.2)]
)
def test_losses_that_are_similar(increases: tuple[float, ...]) -> None:
    assert warn_of_text(rows(*increases)) is None


@pytest.mark.parametrize(
    ("increases", "parts"),
    [
        ((0.24, 1.34), ("+24% on text 0", "+134% on text 1")),
        ((0.61, 0.3), ("+30% on text 1", "+61% on text 0")),
        ((0.2, 0.5, 0.3), ("+20% on text 0", "+50% on text 1")),
        ((-0.01, 0.06), ("−1.00% on text 0", "+6.0% on text 1")),
    ],
)
def test_losses_that_differ(increases: tuple[float, ...], parts: tuple[str, ...]) -> None:
    said = warn_of_text(rows(*increases))
    assert said is not None and all(part in said for part in parts)


def test_intervals_that_meet_are_not_far() -> None:
    cheap, dear = rows(0.1, 0.3)
    cheap["increase_interval"] = [0.05, 0.15]
    for low, long_range in ((0.16, True), (0.14, False)):
        dear["increase_interval"] = [low, 0.4]
        assert (warn_of_text([cheap, dear]) is not None) is long_range


def test_report_says_so(tmp_path: Path) -> None:
    for warning, expected in (("the price differs by text: so & so", True), (None, False)):
        render(MANIFEST, {**VERIFY, "quality_warning": warning}, BENCH, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert ("the price differs by text: so &amp; so" in page) is expected
        assert ("the price differs by text" in (tmp_path / "report.md").read_text()) is expected
    render(MANIFEST, VERIFY, BENCH, tmp_path)  # of a verification that did not say


class Unigram:
    """Says the same of every next token."""

    def __init__(self, probabilities: np.ndarray) -> None:
        self.logits = np.log(probabilities)

    def begin(self, batch: int) -> None:
        pass

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.logits, (*ids_BT.shape, len(self.logits))).astype(np.float32).copy()


def test_pruned_head_cannot_be_priced() -> None:
    class Pruned(Unigram):
        def step(self, ids_BT: np.ndarray) -> np.ndarray:
            return super().step(ids_BT)[:, -1:]

    pruned = Pruned(np.array([0.5, 0.5]))
    with pytest.raises(NblError, match="last position only"):
        quality_loss(pruned, pruned, [("t", np.array([[0, 1, 0]]))], lambda _d, _t: None)


LOOKS = (8, 16, 32)


def shares(mean: float, spread: float) -> np.ndarray:
    """Windows of 101 tokens, of which about this share is 0 and the others are 1."""
    wanted = np.clip(np.random.default_rng(1).normal(mean, spread, 32), 0, 1)
    rows = np.arange(101)[None] % 10 >= 10 * wanted[:, None]
    return rows.astype(np.int64)


@pytest.mark.parametrize(
    ("mean", "spread", "windows"), [(0.5, 0.05, 8), (0.5, 0.1, 16), (0.5, 0.2, 32), (0.6, 0.3, 32), (1.0, 0.05, 8)]
)
def test_a_text_is_read_until_its_loss_is_within_the_limit_or_beyond_it(
    mean: float, spread: float, windows: int
) -> None:
    """Token 0 is 0.105 nats harder than in the original, token 1 is 0.095 nats easier."""
    original, nbl = Unigram(np.array([0.5, 0.5])), Unigram(np.array([0.45, 0.55]))
    texts = [("t", shares(mean, spread))]
    seen: list[tuple[int, int]] = []
    (row,), _ = quality_loss(original, nbl, texts, lambda *done: seen.append(done), looks={"t": LOOKS}, limit=0.05)
    assert (row["windows"], row["looks"], seen[-1]) == (windows, list(LOOKS), (windows, windows))
    (whole,), _ = quality_loss(original, nbl, texts, lambda _d, _t: None)
    before, after = (np.array(whole["per_window"][name]) for name in ("loss_original", "loss_nbl"))
    ends = {size: increase_interval(before[:: 32 // size], after[:: 32 // size], LOOKS).ends or [] for size in LOOKS}
    assert row["per_window"]["loss_nbl"] == after[:: 32 // windows].tolist()
    assert row["increase_interval"] == pytest.approx(ends[windows], rel=1e-9)
    decided = [size for size, (low, high) in ends.items() if high <= 0.05 or low > 0.05]
    assert windows == min(decided, default=32)


def test_a_text_that_is_beyond_the_limit_ends_the_reading_of_others() -> None:
    original, nbl = Unigram(np.array([0.5, 0.5])), Unigram(np.array([0.45, 0.55]))
    texts = [("worst", shares(1.0, 0.05)), ("unclear", shares(0.6, 0.3))]
    found, _ = quality_loss(
        original, nbl, texts, lambda _d, _t: None, looks={name: LOOKS for name, _ in texts}, limit=0.05
    )
    assert [row["windows"] for row in found] == [8, 8]


@pytest.mark.parametrize(
    ("ends", "windows", "said"),
    [
        ([0.07, 0.1], 4, "within"),
        ([0.07, 0.11], 4, "undecided"),
        ([0.09, 0.11], 4, "undecided"),
        ([0.11, 0.13], 4, "beyond"),
        ([0.11, 0.13], 3, None),
    ],
)
def test_a_look_is_decided_by_long_range_tokens_too(ends: list[float], windows: int, said: str | None) -> None:
    """Of which twice the limit may be lost, if there are enough passages."""
    row = {"increase": 0.0, "increase_interval": [-0.01, 0.01]}
    far = {"lost": 0.1, "lost_interval": ends, "windows": windows}
    assert perplexity._verdicts(row, far, 0.05) == ["within", *([said] if said else [])]
    assert perplexity._verdicts(None, None, 0.05) == []


class Windowed:
    """Logits that depend on token and place, of a vocabulary of 5,000, the same however windows are batched."""

    def __init__(self, seed: int, vocabulary: int = 5000) -> None:
        self.table = 3 * np.random.default_rng(seed).standard_normal((7, vocabulary)).astype(np.float32)

        self.widths: list[tuple[int, ...]] = []

    def begin(self, batch: int) -> None:
        self.batch = batch

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        assert len(ids_BT) == self.batch
        self.widths.append(ids_BT.shape)
        return self.table[(ids_BT + np.arange(ids_BT.shape[1])) % 7]


def test_figures_and_intervals_are_those_of_float64_window_by_window() -> None:
    from nbl_export.records.quality import mean_interval

    original, nbl = Windowed(0), Windowed(1)
    windows = np.random.default_rng(2).integers(0, 5000, (9, 200))
    (row,), _ = quality_loss(original, nbl, [("t", windows)], lambda _d, _t: None)
    losses, kls, same = [], [], []
    for window in windows:
        pair = []
        for decoder in (original, nbl):
            decoder.begin(1)
            logits = decoder.step(window[None])[0, :-1].astype(np.float64)
            pair.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
        p, q = pair
        place = np.arange(len(window) - 1)
        losses.append([-v[place, window[1:]].mean() for v in pair])
        kls.append((np.exp(p) * (p - q)).sum(1).mean())
        same.append((p.argmax(1) == q.argmax(1)).mean())
    before, after = np.array(losses).T
    assert (row["tokens"], row["windows"]) == (9 * 200, 9)
    perplexities = row["perplexity_original"], row["perplexity_nbl"]
    assert perplexities == pytest.approx((np.exp(before.mean()), np.exp(after.mean())), rel=1e-5)
    assert row["increase"] == pytest.approx(np.exp(after.mean() - before.mean()) - 1, rel=1e-5)
    assert row["increase_interval"] == pytest.approx(increase_interval(before, after).ends, rel=1e-4)
    assert row["kl_mean"] == pytest.approx(np.mean(kls), rel=1e-5)
    assert row["kl_interval"] == pytest.approx(mean_interval(kls).ends, rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(np.mean(same))
    assert row["per_window"]["loss_nbl"] == pytest.approx(after.tolist(), rel=1e-5)


class Stopping(Windowed):
    """Logits of steps of more than W + 1 tokens are NaN but for the first and the last W."""

    def __init__(self, seed: int, recent_tokens: int) -> None:
        super().__init__(seed, 50)
        self.recent_tokens, self.steps = recent_tokens, []  # type: int, list[int]

    def begin(self, batch: int) -> None:
        super().begin(batch)
        self.place = 0

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        tokens = ids_BT.shape[1]
        self.steps.append(tokens)
        logits = self.table[(ids_BT + self.place + np.arange(tokens)) % 7]
        self.place += tokens
        if tokens > self.recent_tokens + 1:
            logits[:, 1 : -self.recent_tokens] = np.nan
        return logits


@pytest.mark.parametrize("length", [60, 61, 57, 2])
def test_with_an_exit_layer_the_second_half_of_a_window_is_scored(length: int) -> None:
    windows = np.random.default_rng(2).integers(0, 50, (3, length))
    original, nbl = Windowed(0, 50), Stopping(1, 8)
    (row,), _ = quality_loss(original, nbl, [("t", windows)], lambda _d, _t: None, 8)
    prompt = length // 2
    assert row["prompt"] == prompt and all(tokens in (prompt, *range(1, 10)) for tokens in nbl.steps)
    for decoder, key in ((original, "loss_original"), (Windowed(1, 50), "loss_nbl")):
        decoder.begin(3)
        logits = decoder.step(windows)[:, prompt - 1 : -1].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(2, keepdims=True))
        losses = -np.take_along_axis(logits, windows[:, prompt:, None], 2).mean((1, 2))
        np.testing.assert_allclose(row["per_window"][key], losses, rtol=1e-5)


@pytest.mark.parametrize(("logits", "batches"), [(2, [1, 2, 2, 2]), (9, [1, 5, 1]), (0.5, [1] * 7)])
def test_windows_are_read_together_if_their_logits_fit(
    logits: float, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step's bytes for this many windows; and at most 1,024 tokens."""
    monkeypatch.setattr(perplexity, "_STEP_BYTES", int(logits * 199 * 5000 * 4))
    original, seen = Windowed(0), []
    windows = np.random.default_rng(2).integers(0, 5000, (7, 200))
    (row,), _ = quality_loss(original, Windowed(1), [("t", windows)], lambda done, total: seen.append((done, total)))
    read = [batch for batch, width in original.widths if width == 200]
    assert (read, row["windows"], seen[-1]) == (batches, 7, (7, 7))


@pytest.mark.parametrize(("held", "turns"), [(0, 7), (4, 3), (100, 2)])
@pytest.mark.parametrize("recent_tokens", [None, 8])
def test_decoders_that_take_turns_are_never_open_together_and_find_the_same(
    recent_tokens: int | None, held: int, turns: int
) -> None:
    """The first window tells the size of logits; then as many windows as may be held are read in a turn."""
    windows = np.random.default_rng(2).integers(0, 50, (7, 600))
    texts, opened = [("t", windows)], [weakref.WeakSet[Windowed](), weakref.WeakSet[Windowed]()]
    count = [0, 0]

    def opener(index: int) -> Windowed:
        assert not opened[1 - index]
        count[index] += 1
        opened[index].add(made := Windowed(index, 50))
        return made

    first, second = perplexity.in_turn(functools.partial(opener, 0), functools.partial(opener, 1))
    found = quality_loss(first, second, texts, lambda _d, _t: None, recent_tokens, held=held * 599 * 50 * 4)
    assert found == quality_loss(Windowed(0, 50), Windowed(1, 50), texts, lambda _d, _t: None, recent_tokens)
    assert count == [turns, turns]


class Copying:
    """Tokens that have been read are more likely by some nats than others, of a vocabulary of 50."""

    def __init__(self, nats: float, most: int = 1000) -> None:
        self.nats, self.most = nats, most

    def begin(self, batch: int) -> None:
        self.read = np.zeros((batch, 0), np.int64)

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        past = self.read.shape[1]
        self.read = np.concatenate([self.read, ids_BT], 1)
        seen_BTV = np.zeros((*ids_BT.shape, 50), np.float32)
        for b, t in np.ndindex(*ids_BT.shape):
            seen_BTV[b, t, self.read[b, max(0, past + t + 1 - self.most) : past + t + 1]] = self.nats
        return seen_BTV


@pytest.mark.parametrize("recent_tokens", [None, 8])
@pytest.mark.parametrize(("answers", "named"), [(10, True), (10, False), (7, True)])
def test_long_range_tokens_are_a_row_of_their_own(
    recent_tokens: int | None, answers: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens, then 180 of ten others, then the few ones again: only a whole text tells these.

    Short contexts run together, or one by one.
    """
    monkeypatch.setattr(perplexity, "_STEP_BYTES", 1 << 28 if recent_tokens else 1)
    early, filler = np.arange(answers), 10 + np.arange(180) % 10
    windows = np.stack([np.concatenate([order, filler, order]) for order in (early, early[::-1])])
    texts = [("t", windows)] if named else [("other", windows[:, -64:]), (None, windows)]
    ordinary, found = quality_loss(Copying(3.0), Copying(2.0), texts, lambda _d, _t: None, recent_tokens)
    assert [row["text"] for row in ordinary] == [texts[0][0]]
    if answers < 8:
        assert found == []
        return
    (long_range,) = found
    assert (long_range["text"], long_range["tokens"], long_range["windows"]) == ("t" if named else TWICE, 20, 2)
    before, after = (10 * np.log((20 * np.exp(nats) + 30) / np.exp(nats)) for nats in (3.0, 2.0))
    behind = sum(np.log((10 + k) * np.exp(3.0) + 40 - k) for k in range(10))  # fillers, and k early tokens
    np.testing.assert_allclose(long_range["per_window"]["loss_nbl"], after, rtol=1e-5)
    assert long_range["lost"] == pytest.approx((after - before) / (behind - before), rel=1e-5)
    assert long_range["lost_interval"] == pytest.approx([long_range["lost"]] * 2)


def test_a_single_window_has_no_interval() -> None:
    (row,), _ = quality_loss(Windowed(0), Windowed(1), [("t", np.arange(30)[None])], lambda _d, _t: None)
    assert row["windows"] == 1 and row["increase"] is not None
    assert row["increase_interval"] is row["kl_interval"] is row["top1_interval"] is None


@pytest.mark.parametrize(("available", "alone"), [(320, False), (319, True)])
def test_decoders_take_turns_if_both_do_not_fit(
    available: int, alone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two graphs of 100 bytes take 1.6 times as much when they are opened."""
    run = {name: tmp_path / name for name in ("original", "nbl")}
    for folder in run.values():
        folder.mkdir()
        (folder / "model.onnx.data").write_bytes(bytes(100))
    opened: list[Path] = []
    engine = SimpleNamespace(open_graph=lambda folder, _head_dim: opened.append(folder))
    monkeypatch.setattr(memory, "available_bytes", lambda: available)
    verification: Any = SimpleNamespace(engine=engine, spec=SimpleNamespace(head_dim=8))
    _, _, held = verify._open_both(verification, run)
    assert (opened, held) == (([], available // 8) if alone else ([*run.values()], 0))
