"""Shards of a calibration: together exactly the whole, in any order, and nothing else can be put together."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nbl_export.calibrate import hooks
from nbl_export.calibrate.shards import Shard, parse_shard
from nbl_export.calibrate.sums import Accumulator, Sums
from nbl_export.errors import NblError, UsageError
from nbl_export.mixers import lmmse
from nbl_export.model.checkpoint.load import load_model

from ..command import assert_refused, nbl, stage_lines
from ..damage import cut, flip
from ..tiny import HIDDEN, VOCAB, stdlib_text

Checkpoint = Callable[[str], Path]
BATCHES = 9


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_BATCH_TOKENS", 128)


# -- which part ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "-1/2", "a/b", "1/2/3", "1.5/2", "½/2"])
def test_bad_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text)


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_shards_are_disjoint_and_together_the_whole(total: int, data: st.DataObject) -> None:
    of = data.draw(st.integers(1, total))
    parts = [Shard(i, of).batches(total) for i in range(1, of + 1)]
    assert sorted(k for part in parts for k in part) == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# -- any order ---------------------------------------------------------------------------------------------------


def collected(model: Any, parts: list[torch.Tensor], whole: torch.Tensor) -> list[Sums]:
    with hooks.Collection(model, ("residual",)) as found:
        found.refer(whole)
        for part in parts:
            found.add(part)
        return [found.layer(i)["residual"] for i in range(found.num_layers)]


def float64_map(sums: Sums) -> torch.Tensor:
    _, _, cxx, cyx, _ = sums.moments().centred()
    return lmmse._solve(cxx, cyx, 0, lmmse.RIDGE)


def test_shards_merged_in_any_order_give_the_same_maps(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (4 * BATCHES - 1, 32)))
    parts = hooks.batches(ids)
    assert len(parts) == BATCHES
    whole = collected(model, list(parts), ids)
    expected = [float64_map(sums) for sums in whole]

    @functools.cache
    def shard(number: int, of: int) -> list[Sums]:
        return collected(model, [parts[k] for k in Shard(number, of).batches(BATCHES)], ids)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(2, BATCHES).flatmap(lambda n: st.permutations(range(1, n + 1))))
    def check(order: list[int]) -> None:
        total = list(shard(order[0], len(order)))
        for number in order[1:]:
            total = [a.merge(b) for a, b in zip(total, shard(number, len(order)), strict=True)]
        for found, unsharded, map_DD in zip(total, whole, expected, strict=True):
            assert found.count == unsharded.count == ids.numel()
            assert (float64_map(found) - map_DD).norm() <= 1e-12 * map_DD.norm()
            assert torch.equal(found.xx, unsharded.xx)  # more than is asked: not a bit differs

    check()


def test_sums_do_not_depend_on_order_where_plain_float64_ones_do() -> None:
    """Batches of very different size: added without the grid, the last bits depend on the order."""
    generator = torch.Generator().manual_seed(0)
    scales = [30.0, *10 ** np.random.default_rng(0).uniform(-6, 1.5, 40)]
    rows = [torch.randn(2, 256, HIDDEN, generator=generator) * scale for scale in scales]
    rows[0][:, 1::2] = -rows[0][:, ::2]  # a reference of zero, which leaves small rows small
    found, plain = [], []
    for order in (range(41), [0, *range(40, 0, -1)], [0, *range(1, 41, 2), *range(2, 41, 2)]):
        accumulator = Accumulator((HIDDEN, HIDDEN))
        for k in order:
            accumulator.update(*rows[k])
        found.append(accumulator.sums())
        plain.append(sum((rows[k][0].T @ rows[k][0]).double() for k in order))
    assert not all(torch.equal(plain[0], other) for other in plain[1:])
    for other in found[1:]:
        for name, value in vars(found[0]).items():
            assert torch.equal(torch.as_tensor(getattr(other, name)), torch.as_tensor(value)), name


def test_sums_about_different_references_merge(checkpoint: Checkpoint) -> None:
    """Shards of two kinds of machine, whose float32 arithmetic differs in the last bit of the reference."""
    model = load_model(checkpoint("llama"))
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (16, 32)))
    parts = hooks.batches(ids)
    whole = collected(model, list(parts), ids)
    one = collected(model, list(parts[:2]), ids)
    other = collected(model, list(parts[2:]), ids[8:])  # a reference of its own
    assert not torch.equal(one[1].x_ref, other[1].x_ref)
    for a, b, expected in zip(one, other, whole, strict=True):
        found, right = float64_map(a.merge(b)), float64_map(expected)
        assert (found - right).norm() <= 1e-4 * right.norm()


def test_sums_go_on_from_where_they_were(checkpoint: Checkpoint) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 300, HIDDEN, generator=generator) * torch.logspace(-3, 3, HIDDEN) for _ in range(3)]
    through, first, second = (Accumulator((HIDDEN, HIDDEN)) for _ in range(3))
    for x, y in rows:
        through.update(x, y)
    first.update(*rows[0])
    second.restore(first.sums())
    for x, y in rows[1:]:
        second.update(x, y)
    for name, value in vars(through.sums()).items():
        assert torch.equal(torch.as_tensor(getattr(second.sums(), name)), torch.as_tensor(value)), name


# -- the commands ------------------------------------------------------------------------------------------------

GIVEN = ("--calibration-tokens", 1024, "--context", 64)


@pytest.fixture
def collect(checkpoint: Checkpoint, text: Path, tmp_path: Path) -> Callable[..., Path]:
    """(name, shard, more options) -> run directory of a shard."""

    def make(name: str, shard: str | None, *more: object) -> Path:
        part = ("--shard", shard) if shard else ()
        given = ("--model", checkpoint("llama"), "--calibration", text, *GIVEN, *part, *more)
        done = nbl("calibrate", *given, "--output", tmp_path / name)
        assert done.status == 0, done.err
        return tmp_path / name

    return make


def test_merged_shards_are_the_run_that_was_never_split(
    collect: Callable[..., Path], checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    whole = collect("whole", None)
    parts = [collect(f"s{i}", f"{i}/3") for i in (1, 2, 3)]
    loose = shutil.copy(parts[1] / "moments.safetensors", tmp_path / "b.safetensors")
    done = nbl("merge", parts[2], loose, parts[0], "--output", tmp_path / "merged")
    assert done.status == 0, done.err
    assert done.out.strip() == str(tmp_path / "merged" / "moments.safetensors")
    a = hooks.load_moments(whole / "moments.safetensors")["residual"]
    b = hooks.load_moments(tmp_path / "merged" / "moments.safetensors")["residual"]
    for x, y in zip(a, b, strict=True):
        assert x.count == y.count == 1024
        assert all(torch.equal(getattr(x, n), getattr(y, n)) for n in ("x_sum", "y_sum", "xx", "yx", "yy"))
    ours, theirs = (json.loads((d / "nbl.json").read_text()) for d in (tmp_path / "merged", whole))
    for fact in ("model", "decoder", "calibration", "places", "num_layers", "options"):
        assert ours[fact] == theirs[fact], fact
    again = nbl("merge", *parts, "--output", tmp_path / "merged")
    assert again.status == 0 and "merge: reused" in again.err
    planned = nbl("plan", tmp_path / "merged", "--layers", 1)
    assert stage_lines(planned) == {"calibrate": "reused", "plan": "done"}, planned.err
    given = ("--model", checkpoint("llama"), "--calibration", text, *GIVEN, "--output", tmp_path / "merged")
    assert stage_lines(nbl("calibrate", *given)) == {"calibrate": "reused"}


def test_a_shard_by_itself_goes_no_further(collect: Callable[..., Path]) -> None:
    run = collect("s1", "1/2")
    assert "calibrate --model" in json.loads((run / "nbl.json").read_text())["command"]
    assert "--shard 1/2" in json.loads((run / "nbl.json").read_text())["command"]
    assert_refused(nbl("plan", run), 1, run, "shard 1/2", "nbl-export merge")
    with pytest.raises(NblError, match="shard 1 of 2"):
        hooks.load_moments(run / "moments.safetensors")


def test_what_does_not_belong_together_is_refused(
    collect: Callable[..., Path], checkpoint: Checkpoint, text: Path, tmp_path: Path
) -> None:
    one, two = collect("s1", "1/2"), collect("s2", "2/2")
    other_text = tmp_path / "other.txt"
    other_text.write_text(stdlib_text(90_000)[30_000:], encoding="utf-8")
    merged = tmp_path / "merged"
    third = collect("third", "2/3")
    taps = collect("taps", "2/2", "--tap", "normed")
    others = {
        "of different models": collect("mistral", "2/2", "--model", checkpoint("mistral")),
        "different calibration texts": collect("text", "2/2", "--calibration", other_text),
        "different --context": collect("context", "2/2", "--context", 32),
        "different numbers of tokens": collect("tokens", "2/2", "--calibration-tokens", 512),
        "different taps": taps,
        "is a shard of 2": third,
        "shard 1 of 2 is given twice": one,
    }
    for reason, run in others.items():
        assert_refused(nbl("merge", one, run, "--output", merged), 1, reason, run)
    assert_refused(nbl("merge", two, "--output", merged), 1, "shard 1 of 2 missing")
    assert_refused(nbl("merge", third, "--output", merged), 1, "shards 1, 3 of 3 missing")
    assert_refused(nbl("merge", one, tmp_path / "nothing", "--output", merged), 1, tmp_path / "nothing")
    assert_refused(nbl("merge", one, two, "--output", one), 1, one, "is one of the shards")
    assert_refused(nbl("merge", one, two, "--output", taps), 1, taps, "holds another run")
    assert not merged.exists()


@pytest.mark.parametrize("kind", ["directory", "file"])
@pytest.mark.parametrize("harm", [flip, lambda path: cut(path, path.stat().st_size - 100)], ids=["flip", "cut"])
def test_damaged_shard_is_refused(
    kind: str, harm: Callable[[Path], None], collect: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = collect("s1", "1/2"), collect("s2", "2/2")
    file = two / "moments.safetensors"
    harm(file)
    given = two if kind == "directory" else file
    assert_refused(nbl("merge", one, given, "--output", tmp_path / "merged"), 1, file)
    assert not (tmp_path / "merged").exists()


def test_more_shards_than_batches_is_refused_before_the_model_is_loaded(
    checkpoint: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.model.checkpoint.load.load_model", lambda _d: pytest.fail("the model was loaded"))
    given = ("--model", checkpoint("llama"), "--calibration", text, *GIVEN, "--output", tmp_path / "run")
    assert_refused(nbl("calibrate", *given, "--shard", "1/9"), 1, "--shard 1/9", "at most 8 shards")
    assert_refused(nbl("calibrate", *given, "--shard", "3/2"), 2, "--shard 3/2")
