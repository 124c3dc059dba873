"""Greedy order: the least loss first, whatever was computed before, and the shared prefixes change nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.model import bfloat16
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.model.mixes import Loss, SwitchedModel
from nbl_export.plan import greedy
from nbl_export.plan.greedy import EVERY, GreedyOrder, extend
from nbl_export.records.plan import AffineMap

from ..command import nbl
from ..tiny import LAYERS, VOCAB, random_map

Checkpoint = Callable[[str], Path]
HELD = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


def small_map(layer: int) -> AffineMap:
    found = random_map(layer)
    return AffineMap(found.weight * 0.1 * (layer + 1), found.bias * 0.1)


MAPS = {i: small_map(i) for i in range(LAYERS)}


def quiet(_done: int, _total: int) -> None:
    pass


def whole_models(checkpoint: Path, mix: tuple[int, ...], tap: str, every: int = 1) -> tuple[float, float, float]:
    """KL and both perplexities from two separate models, of every n-th position but the last of each window."""
    with torch.no_grad():
        base = load_model(checkpoint)(HELD).logits[:, :-1].log_softmax(-1)
        model = linearize(load_model(checkpoint), {i: MAPS[i] for i in mix}, tap)
        ours = model(HELD, use_cache=False).logits[:, :-1].log_softmax(-1)
    base, ours, target = base[:, ::every], ours[:, ::every], HELD[:, 1::every, None]
    kl = (base.exp() * (base - ours)).sum(-1).mean().item()
    return kl, *((-p.gather(2, target).mean()).exp().item() for p in (base, ours))


@pytest.mark.parametrize("tap", ["residual", "normed"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_price_of_every_mix_is_that_of_whole_models(architecture: str, tap: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(architecture)
    switched = SwitchedModel(load_model(directory), MAPS, tap)
    for mix in (s for n in range(1, LAYERS) for s in itertools.combinations(range(LAYERS), n)):
        loss = switched.price(HELD, mix)
        kl, original, ours = whole_models(directory, mix, tap)
        assert loss.positions == HELD.numel() - len(HELD)
        assert loss.kl == pytest.approx(kl, rel=1e-3)
        assert loss.perplexities == pytest.approx((original, ours), rel=1e-4)


def test_nothing_replaced_loses_nothing(checkpoint: Checkpoint) -> None:
    loss = SwitchedModel(load_model(checkpoint("llama")), MAPS, "residual").price(HELD, ())
    assert loss.kl == 0.0
    assert loss.perplexities[0] == loss.perplexities[1]


def test_losses_of_narrow_products_are_those_of_their_logits(checkpoint: Checkpoint) -> None:
    """In bfloat16 a logarithm of a sum of exponentials would have two or three digits, and losses to compare none."""
    model = load_model(checkpoint("llama"))
    torch.manual_seed(0)
    original = torch.randn(len(HELD[0]), model.config.hidden_size)
    mix = original + 0.05 * torch.randn(original.shape)
    with bfloat16.products(original.device, True):
        loss = SwitchedModel(model, MAPS, "residual").losses(HELD[0], original, {"mix": mix})["mix"]
        log_p, log_q = (model.lm_head(h[:-1]).double().log_softmax(-1) for h in (original, mix))
    assert loss.kl_sum == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-3)
    assert loss.mix_sum == pytest.approx(-log_q.gather(1, HELD[0][1:, None]).sum().item(), rel=1e-5)


@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_each_step_takes_the_layer_that_loses_least(tap: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama")
    order = extend(GreedyOrder(), 2, SwitchedModel(load_model(directory), MAPS, tap), LAYERS, HELD, quiet)
    gone: tuple[int, ...] = ()
    for layer, kl in zip(order.layers, order.kl, strict=True):
        losses = {i: whole_models(directory, (*gone, i), tap, EVERY)[0] for i in range(LAYERS) if i not in gone}
        assert layer == min(losses, key=lambda i: losses[i])
        assert kl == pytest.approx(losses[layer], rel=1e-3)
        gone = (*gone, layer)


def test_an_order_goes_on_as_if_made_at_once_and_a_shorter_one_is_its_front(checkpoint: Checkpoint) -> None:
    switched = SwitchedModel(load_model(checkpoint("llama")), MAPS, "residual")
    whole = extend(GreedyOrder(), 2, switched, LAYERS, HELD, quiet)
    first = extend(GreedyOrder(), 1, switched, LAYERS, HELD, quiet)
    kept = GreedyOrder.from_json(json.loads(json.dumps(vars(first))))
    assert kept == first
    assert first.layers == whole.layers[:1]
    assert extend(kept, 2, switched, LAYERS, HELD, quiet) == whole
    assert extend(whole, 1, switched, LAYERS, HELD, quiet) is whole


class Planted:
    """Losses by formula instead of a model: each layer its own price, and a second of a pair is dear."""

    def __init__(self) -> None:
        self.tried: list[tuple[int, ...]] = []

    def run(self, mix: Any, **_given: Any) -> tuple[Any, dict[int, Any]]:
        return tuple(mix), dict.fromkeys(range(30))

    def losses(self, _ids: Any, _original: Any, mixes: Any, _every: int) -> dict[int, Loss]:
        self.tried.append(tuple(mixes))
        price = {i: 0.01 * ((i * 7) % 30) + 0.001 for i in range(30)}
        return {i: Loss(1, sum(price[k] + (k - 1 in mix) for k in mix)) for i, mix in mixes.items()}


def test_rounds_after_the_first_try_only_the_cheapest(monkeypatch: pytest.MonkeyPatch) -> None:
    planted: Any = Planted()
    seen: list[tuple[int, int]] = []
    order = extend(GreedyOrder(), 6, planted, 30, HELD[:1], lambda a, b: seen.append((a, b)))
    assert [len(t) for t in planted.tried] == [30] + [greedy.WIDTH] * 5
    assert seen[-1] == (30 + 5 * greedy.WIDTH, 30 + 5 * greedy.WIDTH)
    monkeypatch.setattr(greedy, "WIDTH", 30)
    assert extend(GreedyOrder(), 6, planted, 30, HELD[:1], quiet).layers == order.layers


def test_what_saves_more_may_lose_more() -> None:
    """The topmost layers, dear by themselves, go first where each saves far more than another."""
    planted: Any = Planted()

    def saving(gone: Any) -> float:
        tail = next(n for n in range(31) if 29 - n not in gone)
        return len(gone) + 1e10 * tail

    order = extend(GreedyOrder(), 4, planted, 30, HELD[:1], quiet, saving)
    assert order.layers == (29, 28, 27, 26)
    assert all(29 - k in tried for k, tried in enumerate(planted.tried))
    assert [len(t) for t in planted.tried] == [30] + [greedy.WIDTH] * 3
    assert extend(GreedyOrder(), 4, planted, 30, HELD[:1], quiet).layers != order.layers


@pytest.mark.parametrize(("work", "first"), [(3.5, 1), (4.5, 0)])
def test_twice_the_loss_is_for_four_times_the_work(work: float, first: int) -> None:
    class Two(Planted):
        def losses(self, _ids: Any, _original: Any, mixes: Any, _every: int) -> dict[int, Loss]:
            return {i: Loss(1, 0.2 if i == 0 else 0.1) for i in mixes}

    planted: Any = Two()
    order = extend(GreedyOrder(), 1, planted, 2, HELD[:1], quiet, lambda gone: sum(work if i == 0 else 1 for i in gone))
    assert order.layers == (first,)


def test_the_model_comes_back_as_it_was(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    modules, layers = list(model.modules()), list(model.model.layers)
    extend(GreedyOrder(), 2, SwitchedModel(model, MAPS, "residual"), LAYERS, HELD, quiet)
    assert list(model.modules()) == modules
    assert list(model.model.layers) == layers
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_maps_that_are_not_finite_are_left_or_named(checkpoint: Checkpoint) -> None:
    bad = {i: AffineMap(MAPS[i].weight * float("inf"), MAPS[i].bias) for i in range(LAYERS)}
    model = load_model(checkpoint("llama"))
    order = extend(GreedyOrder(), 1, SwitchedModel(model, {**bad, 1: MAPS[1]}, "residual"), LAYERS, HELD, quiet)
    assert order.layers == (1,)
    with pytest.raises(NblError, match="layer 0 gives logits that are not finite"):
        extend(GreedyOrder(), 1, SwitchedModel(model, bad, "residual"), LAYERS, HELD, quiet)


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


def test_selections_through_the_job(run: Path) -> None:
    for select, key in (("error", "relative_error"), ("cca", "bound")):
        done = nbl("plan", run, "--layers", "1", "--select", select)
        assert done.status == 0, done.err
        assert "calibrate: reused" in done.err
        facts = facts_of(run)
        assert facts["select"] == select
        assert facts["replaced_layers"] == [min(facts["scores"], key=lambda s: (s[key], s["layer"]))["layer"]]
    done = nbl("plan", run, "--layers", "2", "--select", "greedy", "--json")
    assert done.status == 0, done.err
    facts = facts_of(run)
    assert json.loads(done.out)["select"] == facts["select"] == "greedy"
    assert sorted(facts["greedy"]["layers"]) == facts["replaced_layers"]
    kept = facts["greedy"]
    assert nbl("plan", run, "--layers", "1").status == 0
    assert facts_of(run)["replaced_layers"] == kept["layers"][:1]
    assert facts_of(run)["greedy"] == kept
    damaged = {**facts_of(run), "greedy": {"key": kept["key"], "layers": "none"}}
    (run / "nbl.json").write_text(json.dumps(damaged), encoding="utf-8")
    assert nbl("plan", run, "--layers", "2").status == 0
    assert facts_of(run)["greedy"] == kept
    assert nbl("plan", run, "--layers", "0,2", "--select", "greedy").status == 0
    assert (facts_of(run)["select"], facts_of(run)["replaced_layers"]) == ("given", [0, 2])


def test_layers_are_judged_on_another_text_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbl_export.records.options import JobOptions
    from nbl_export.run.job import Job
    from nbl_export.run.progress import Ui
    from nbl_export.run.resolved import located
    from nbl_export.run.stages.plan import Selection
    from nbl_export.run_directory import RunDirectory

    with RunDirectory.open_run(run, create=False) as opened:
        options = located(JobOptions.from_json(opened.manifest["options"]), opened)
        job = Job(options, opened, Ui(quiet=True))
        seen: list[Any] = []
        bfloat16: list[bool] = []

        def note(order: GreedyOrder, *given: Any) -> GreedyOrder:
            seen.append(given[3])
            bfloat16.append(torch.is_autocast_enabled("cpu"))
            return order

        monkeypatch.setattr("nbl_export.run.stages.plan.extend", note)
        for native in (True, False):  # products of bfloat16, in which trials are computed where they are
            monkeypatch.setattr("nbl_export.model.bfloat16.fast", lambda _device, native=native: native)
            Selection(job, select="greedy").order(1)
        assert bfloat16 == [True, False]
        windows = seen[0]
        near, far = job.held_back, job.far
    half = len(windows) // 2
    assert windows[:half].tolist() == near.choosing[:half].tolist()
    others = [tuple(row) for row in windows[half:].tolist()]
    assert len(set(others)) == half and far is not None
    assert set(others) <= {tuple(row) for row in far.choosing.tolist()}


def test_unknown_selection_is_refused(run: Path) -> None:
    done = nbl("plan", run, "--select", "luck")
    assert done.status == 1
    assert "--select is cca, error, greedy, efficient, not 'luck'" in done.err
