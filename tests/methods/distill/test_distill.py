"""Distilled maps: better on held-back text or as they were, the same for a seed, the model left alone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model, load_tokenizer
from nbl_export.methods.distill.state import State
from nbl_export.methods.distill.training import Callbacks, DistillSettings, _batches, _Training, distill
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.lmmse import fit
from nbl_export.text import corpus
from nbl_export.text import windows as text_windows
from tests.disk import calls_of_os

Checkpoint = Callable[[str], Path]
# By the original alone: a model of random weights knows no text, whose tokens would only draw it away.
QUICK = DistillSettings(steps=60, batch_tokens=256, check_every=20, learning_rate=3e-2, lora_rank=4, label_weight=0.0)


@pytest.fixture(scope="module")
def prepared(checkpoint: Checkpoint, text: Path) -> dict[str, Any]:
    """A tiny model, text, and closed-form maps of layers 1 and 2 on both taps."""
    model = load_model(checkpoint("llama"))
    windows, held = text_windows.pack(corpus.read_text(str(text)), load_tokenizer(checkpoint("llama")), 8192, 64, 512)
    moments = collect.collect(model, windows, lambda _d, _t: None, ("residual", "normed"))
    maps = {tap: {i: Linear(*fit(found[i], i)) for i in (1, 2)} for tap, found in moments.items()}
    return {"model": model, "windows": windows, "held": held, "maps": maps}


def run(
    prepared: dict[str, Any], tap: str, settings: DistillSettings = QUICK, state: State | None = None, **more: Any
) -> Any:
    text, around = (prepared["windows"], prepared["held"]), Callbacks(state=state, **more)
    return distill(prepared["model"], prepared["maps"][tap], tap, *text, settings, around)


@pytest.fixture(scope="module")
def plain(prepared: dict[str, Any]) -> Any:
    """What `QUICK` makes of the maps on the normed tap."""
    return run(prepared, "normed")


def held_kl(checkpoint: Path, maps: dict[int, Linear], held: torch.Tensor, tap: str) -> float:
    """The same figure, from two whole models."""
    with torch.inference_mode():
        target = load_model(checkpoint)(held).logits.log_softmax(-1)
        ours = linearize(load_model(checkpoint), maps, tap)(held, use_cache=False).logits.log_softmax(-1)
    return float((target.exp() * (target - ours)).sum(-1).mean())


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_held_back_kl_falls_and_is_what_whole_models_give(
    tap: str, prepared: dict[str, Any], plain: Any, checkpoint: Checkpoint
) -> None:
    result = plain if tap == "normed" else run(prepared, tap)
    start, best = result.held_kl[0][1], min(v for _, v in result.held_kl)
    assert best < 0.95 * start
    assert held_kl(checkpoint("llama"), prepared["maps"][tap], prepared["held"], tap) == pytest.approx(start, rel=1e-3)
    assert held_kl(checkpoint("llama"), result.maps, prepared["held"], tap) == pytest.approx(best, rel=1e-3)


def test_never_worse_than_the_start(prepared: dict[str, Any]) -> None:
    """A learning rate that destroys the maps gives back the maps it was given."""
    result = run(prepared, "normed", DistillSettings(steps=10, batch_tokens=256, check_every=5, learning_rate=5.0))
    assert all(v >= result.held_kl[0][1] for _, v in result.held_kl[1:])
    for i, affine in prepared["maps"]["normed"].items():
        np.testing.assert_array_equal(result.maps[i].weight, affine.weight)
        np.testing.assert_array_equal(result.maps[i].bias, affine.bias)


def test_same_seed_same_maps(prepared: dict[str, Any]) -> None:
    short = dataclasses.replace(QUICK, steps=12, check_every=4)
    once, again = (run(prepared, "normed", short) for _ in range(2))
    assert min(once.held_kl, key=lambda found: found[1])[0] > 0  # maps that were trained
    assert all(np.array_equal(once.maps[i].weight, again.maps[i].weight) for i in once.maps)
    assert once.train_kl == again.train_kl


@pytest.mark.parametrize(
    ("steps", "patience", "drops_layers", "taken"), [(100, 0.02, False, 2), (20, 0.5, False, 10), (20, 0.5, True, 18)]
)
def test_stops_when_held_back_text_no_longer_improves(
    steps: int, patience: float, drops_layers: bool, taken: int, prepared: dict[str, Any]
) -> None:
    """Its patience is a share of the run, however often it looks, and begins anew when layers are given back."""
    settings = DistillSettings(
        steps=steps, batch_tokens=128, check_every=1, patience=patience, learning_rate=0.0, drops_layers=drops_layers
    )
    assert len(run(prepared, "normed", settings).train_kl) == taken


def test_a_rate_that_is_far_too_high_is_lowered_until_training_helps(prepared: dict[str, Any]) -> None:
    said: list[str] = []
    settings = dataclasses.replace(QUICK, steps=120, check_every=10, learning_rate=0.6)
    result = run(prepared, "normed", settings, say=said.append)
    assert any("KL runs away" in line for line in said)
    assert min(kl for _, kl in result.held_kl) < 0.95 * result.held_kl[0][1]


def test_model_comes_back_as_it_was(prepared: dict[str, Any]) -> None:
    model = prepared["model"]
    layers, before = list(model.model.layers), {n: p.clone() for n, p in model.named_parameters()}
    run(prepared, "residual", DistillSettings(steps=2, batch_tokens=128, check_every=1))
    assert list(model.model.layers) == layers
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


DROPPING = dataclasses.replace(QUICK, drops_layers=True)  # at step 24 of 60


@pytest.fixture(scope="module")
def dropped(prepared: dict[str, Any]) -> tuple[Any, dict[int, Any]]:
    """What `DROPPING` makes of layer 2, and the maps of both layers when layer 1 is given back."""
    seen: list[dict[int, Any]] = []

    def drop_layers(maps: dict[int, Any]) -> tuple[int, ...]:
        seen.append(maps)
        return (2,)

    result = run(prepared, "normed", DROPPING, drop_layers=drop_layers)
    (trained,) = seen
    return result, trained


def test_layers_are_given_back_and_the_rest_is_trained_further(
    prepared: dict[str, Any], dropped: tuple[Any, dict[int, Any]], checkpoint: Checkpoint
) -> None:
    result, trained = dropped
    assert set(trained) == {1, 2} and set(result.maps) == {2}
    assert np.abs(trained[2].weight - prepared["maps"]["normed"][2].weight).max() > 0
    (step, start), *others = result.held_kl[result.dropped_at :]
    assert step == 24 and [s for s, _ in result.held_kl[: result.dropped_at]] == [0, 20]
    model, held = checkpoint("llama"), prepared["held"]
    assert held_kl(model, {2: trained[2]}, held, "normed") == pytest.approx(start, rel=1e-3)
    best = min(kl for _, kl in others)
    assert best < start and held_kl(model, result.maps, held, "normed") == pytest.approx(best, rel=1e-3)


def test_a_layer_that_stays_keeps_what_the_optimizer_knows(prepared: dict[str, Any], plain: Any) -> None:
    """Where all layers stay, training goes on as if nobody had asked."""
    asked = run(prepared, "normed", DROPPING, drop_layers=lambda maps: tuple(maps))
    assert asked.train_kl == plain.train_kl


def test_a_killed_run_does_not_give_layers_back_twice(
    prepared: dict[str, Any], dropped: tuple[Any, dict[int, Any]], tmp_path: Path
) -> None:
    whole, _ = dropped
    with pytest.raises(Killed):
        run(prepared, "normed", DROPPING, Fragile(tmp_path / "state", 3, after=True), drop_layers=lambda _: (2,))
    again = run(prepared, "normed", DROPPING, State(tmp_path / "state", "key"))  # nobody to ask
    assert (again.train_kl, again.held_kl, again.dropped_at) == (whole.train_kl, whole.held_kl, whole.dropped_at)
    np.testing.assert_array_equal(again.maps[2].weight, whole.maps[2].weight)


def test_epochs_divide_the_text_anew() -> None:
    """Each takes nearly all of it, in rows that begin elsewhere, in another order."""
    text = torch.arange(6 * 64).view(6, 64)
    first, second = _batches(text, DistillSettings(steps=2, batch_tokens=352, window=32))
    for rows in (first, second):
        assert rows.shape == (11, 32)
        assert (rows - rows[:, :1] == torch.arange(32)).all()
        assert len(set(rows.flatten().tolist())) == rows.numel()
        assert len({int(start) % 32 for start in rows[:, 0]}) == 1
    assert first[0, 0] % 32 != second[0, 0] % 32
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())


def test_the_seed_gives_the_rows_and_the_order_of_the_text() -> None:
    text = torch.arange(6 * 64).view(6, 64)

    def first_batch(seed: int) -> list[list[int]]:
        (batch,) = _batches(text, DistillSettings(steps=1, batch_tokens=352, window=32, seed=seed))
        return batch.tolist()

    assert first_batch(1) == first_batch(1)
    assert len({first_batch(seed)[0][0] % 32 for seed in range(8)}) > 1  # starts of rows
    assert len({tuple(row[0] // 32 for row in first_batch(seed)) for seed in range(8)}) == 8  # orders


def test_short_text_is_a_batch_by_itself() -> None:
    (batch,) = _batches(torch.arange(16).view(1, 16), DistillSettings(steps=1, batch_tokens=1024))
    assert batch.tolist() == [list(range(16))]


def test_nothing_to_train_is_refused(prepared: dict[str, Any]) -> None:
    with pytest.raises(NblError, match="at least one replaced layer"):
        distill(prepared["model"], {}, "residual", prepared["windows"], prepared["held"], QUICK)


class Killed(BaseException):
    pass


class Fragile(State):
    """Dies at the n-th save, before or after it is done."""

    def __init__(self, path: Path, at: int, after: bool) -> None:
        super().__init__(path, "key")
        self.left, self.after = at, after

    def save(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        self.left -= 1
        if self.left or self.after:
            super().save(tensors, facts)
        if not self.left:
            raise Killed


@pytest.mark.fuzz
@pytest.mark.parametrize(
    "settings",
    [QUICK, dataclasses.replace(QUICK, learning_rate=3.0, check_every=6)],  # rollbacks are 5 steps apart: between saves
    ids=["steady", "rolling back"],
)
def test_killed_runs_end_with_the_same_maps(
    settings: DistillSettings, prepared: dict[str, Any], tmp_path: Path
) -> None:
    """At each save of the run, with the checks and between them; and killed again and again."""
    whole = run(prepared, "normed", settings)
    for at, after in itertools.product((1, 2, 3, 4, 5, 6), (False, True)):
        path = tmp_path / f"{at}-{after}"
        with pytest.raises(Killed):
            run(prepared, "normed", settings, Fragile(path, at, after))
        again = run(prepared, "normed", settings, State(path, "key"))
        assert (again.train_kl, again.held_kl) == (whole.train_kl, whole.held_kl)
        for i, best in whole.maps.items():
            np.testing.assert_array_equal(again.maps[i].weight, best.weight)
            np.testing.assert_array_equal(again.maps[i].bias, best.bias)


def test_a_resumed_run_rolls_back_to_the_best_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the parameters at the kill."""

    def training(value: float) -> _Training:
        trained = {"0.linear.bias": torch.nn.Parameter(torch.full((2,), value))}
        maps = {0: Linear(np.eye(2, dtype=np.float32), np.zeros(2, np.float32))}
        pair: Any = SimpleNamespace(trained=trained, units={}, maps=lambda: maps)
        return _Training(pair, DistillSettings(steps=100), [])

    first = training(0.5)
    first.result.held_kl, first.result.train_kl, first.step, first.slowed = [(0, 0.1)], [9.0] * 10, 10, 0.25
    monkeypatch.setattr(first, "_held_kl", lambda: 0.05)
    with torch.no_grad():
        first.pair.trained["0.linear.bias"].fill_(1.0)
        first.judge()  # the best
        first.pair.trained["0.linear.bias"].fill_(2.0)  # where steps led since
    first.save(State(tmp_path / "state", "key"))
    again = training(0.0)
    again.begin(State(tmp_path / "state", "key"))
    bias = again.pair.trained["0.linear.bias"]
    assert bias.tolist() == [2.0, 2.0] and again.slowed == 0.25
    bias.grad = torch.ones(2)
    again.optimizer.step()
    assert again.rollback() and again.best_at == again.fraction == 0.1  # its patience begins anew
    bias.grad = torch.zeros(2)
    again.optimizer.step()  # nothing of the steps before pushes it
    assert bias.tolist() == [1.0, 1.0]


def test_only_the_state_of_the_same_run_is_gone_on_from(prepared: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(Killed):
        run(prepared, "normed", QUICK, Fragile(path, 1, after=True))
    assert State(path, "key").load() is not None
    assert State(path, "another").load() is None
    whole = path.read_bytes()
    facts = whole.index(b'\\"step\\": 10') + 10
    damages = [
        whole[:-100],
        whole[:-100] + bytes(100),  # of the right length, as after a loss of power
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        whole[:facts] + b"2" + whole[facts + 1 :],
    ]
    for damaged in damages:
        assert damaged != whole
        path.write_bytes(damaged)
        assert State(path, "key").load() is None
    path.write_bytes(whole)
    assert State(path, "key").load() is not None
    assert State(tmp_path / "nothing", "key").load() is None
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_state_is_on_the_disk_before_it_replaces_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = calls_of_os(monkeypatch)
    State(tmp_path / "state", "key").save({"a": torch.ones(100)}, {"step": 1})
    assert done == [("fsync", (tmp_path / "state").stat().st_size), ("replace", str(tmp_path / "state"))]


def test_lora_trains_a_delta_of_its_rank(prepared: dict[str, Any], plain: Any) -> None:
    for i, affine in prepared["maps"]["normed"].items():
        delta = np.linalg.svd(plain.maps[i].weight - affine.weight, compute_uv=False)
        assert delta[3] > 1e-4 > 1e-6 > delta[4]
        assert not np.array_equal(plain.maps[i].bias, affine.bias)


def test_lora_is_initialised_once_and_a_run_that_goes_on_keeps_them(
    prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    monkeypatch.setattr(
        "nbl_export.methods.distill.training._Training.init_lora_from_gradient",
        lambda _self, batches: lengths.append(len(list(batches))),
    )
    with pytest.raises(Killed):
        run(prepared, "normed", QUICK, Fragile(tmp_path / "state", 1, after=True))
    with pytest.raises(Killed):  # which is soon enough
        run(prepared, "normed", QUICK, Fragile(tmp_path / "state", 1, after=True))
    assert lengths == [3]  # a twentieth of 60 steps


def test_bfloat16_trains_as_well_and_is_judged_in_float32(prepared: dict[str, Any], plain: Any) -> None:
    wide, bf16 = plain, run(prepared, "normed", dataclasses.replace(QUICK, dtype="bf16"))
    assert bf16.held_kl[0] == wide.held_kl[0]
    assert bf16.train_kl[0] == pytest.approx(wide.train_kl[0], rel=0.05)
    assert bf16.train_kl[0] != wide.train_kl[0]
    gain = [min(v for _, v in r.held_kl) - r.held_kl[0][1] for r in (bf16, wide)]
    assert gain[0] == pytest.approx(gain[1], rel=0.1)


def test_minutes_end_a_run_and_its_schedule(prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves one second a look: the rate has fallen to nothing when the minutes are over."""
    ticks = itertools.count()
    monkeypatch.setattr(
        "nbl_export.methods.distill.training.time", SimpleNamespace(monotonic=lambda: float(next(ticks)))
    )
    rates: list[float] = []
    step = torch.optim.Adam.step

    def noted(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    settings = DistillSettings(steps=10_000, minutes=1.99, batch_tokens=128, check_every=1000, learning_rate=1e-3)
    seen: list[int] = []
    result = run(prepared, "normed", settings, progress=lambda done, _total: seen.append(done))
    assert seen[-1] == 1000 == max(seen)  # the last step ends behind the minutes
    assert 10 < len(result.train_kl) <= 120
    assert result.held_kl[-1][0] == len(result.train_kl)
    assert rates[0] > 0.99e-3 > 1e-5 > rates[-1]
    assert rates == sorted(rates, reverse=True)
