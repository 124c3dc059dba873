"""Greedy order: the least loss first, whatever was computed before, and the shared prefixes change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import greedy
from nbl_export.methods.linear.greedy import EVERY, Effects, Judge, Point, Search
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.linear.order import Selection
from nbl_export.methods.losses import PartialReplacement
from nbl_export.model.head import logits_of
from nbl_export.records.from_json import read_record
from nbl_export.run.stages.plan import choice_of
from nbl_export.run_directory import TEXT_FILE
from nbl_export.text.parts import read
from tests.jobs import opened
from tests.tiny import LAYERS, VOCAB, random_map

Checkpoint = Callable[[str], Path]
HELD = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


def small_map(layer: int) -> Linear:
    found = random_map(layer)
    return Linear(found.weight * 0.1 * (layer + 1), found.bias * 0.1)


MAPS = {i: small_map(i) for i in range(LAYERS)}


def quiet(_done: int, _total: int) -> None:
    pass


def even(_gone: Sequence[int]) -> float:
    """All layers save as much."""
    return 1.0


def whole_models(
    checkpoint: Path, replaced_set: tuple[int, ...], tap: str, every: int = 1
) -> tuple[float, float, float]:
    """KL and both perplexities from two separate models, of every n-th position but the last of each window."""
    with torch.no_grad():
        base = load_model(checkpoint)(HELD).logits[:, :-1].log_softmax(-1)
        model = linearize(load_model(checkpoint), {i: MAPS[i] for i in replaced_set}, tap)
        ours = model(HELD, use_cache=False).logits[:, :-1].log_softmax(-1)
    base, ours, target = base[:, ::every], ours[:, ::every], HELD[:, 1::every, None]
    kl = (base.exp() * (base - ours)).sum(-1).mean().item()
    return kl, *((-p.gather(2, target).mean()).exp().item() for p in (base, ours))


@pytest.mark.parametrize("tap", ["residual", "normed"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_quality_loss_of_every_mix_is_that_of_whole_models(architecture: str, tap: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(architecture)
    switched = PartialReplacement(load_model(directory), MAPS, tap)
    for replaced_set in (s for n in range(1, LAYERS) for s in itertools.combinations(range(LAYERS), n)):
        loss = switched.quality_losses(HELD, {"mix": replaced_set})["mix"]
        kl, original, ours = whole_models(directory, replaced_set, tap)
        assert loss.positions == HELD.numel() - len(HELD)
        assert loss.kl == pytest.approx(kl, rel=1e-3)
        assert loss.perplexities == pytest.approx((original, ours), rel=1e-4)


def test_nothing_replaced_loses_nothing(checkpoint: Checkpoint) -> None:
    loss = PartialReplacement(load_model(checkpoint("llama")), MAPS, "residual").quality_losses(HELD, {"mix": ()})[
        "mix"
    ]
    assert loss.kl == 0.0
    assert loss.perplexities[0] == loss.perplexities[1]


def test_texts_may_differ_in_length(checkpoint: Checkpoint) -> None:
    """Each has the effects that it has by itself, and progress counts all of them."""
    switched = PartialReplacement(load_model(checkpoint("llama")), MAPS, "residual")
    texts = [HELD, HELD[:1], HELD[:2].flatten()[None]]
    done: list[tuple[int, int]] = []
    judge = Judge(switched, texts)
    found = judge.alone(lambda *state: done.append(state)).split(judge.parts)
    for text, part in zip(texts, found, strict=True):
        by_itself = Judge(switched, [text]).alone(quiet)
        torch.testing.assert_close(part.kl_NK, by_itself.kl_NK)
        torch.testing.assert_close(part.rise_NK, by_itself.rise_NK)
    assert done == [(k + 1, 2 * LAYERS) for k in range(2 * LAYERS)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_losses_of_bf16_products_are_those_of_the_logits(architecture: str, checkpoint: Checkpoint) -> None:
    """Only changes of logits are products in bfloat16, so losses and KL keep three digits."""
    model = load_model(checkpoint(architecture))
    torch.manual_seed(0)
    original = torch.randn(len(HELD[0]), model.config.hidden_size)
    replaced_set = original + 0.05 * torch.randn(original.shape)
    loss = PartialReplacement(model, MAPS, "residual", bf16_matmul=True).losses(
        HELD[0], original, {"mix": replaced_set}
    )["mix"]
    log_p, log_q = (logits_of(model, h[:-1]).double().log_softmax(-1) for h in (original, replaced_set))
    assert loss.kl_sum == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-2)
    assert loss.original_sum == pytest.approx(-log_p.gather(1, HELD[0][1:, None]).sum().item(), rel=1e-5)
    assert loss.nbl_sum == pytest.approx(-log_q.gather(1, HELD[0][1:, None]).sum().item(), rel=1e-4)


def judged(switched: PartialReplacement) -> Judge:
    return Judge(switched, [HELD])


@pytest.mark.parametrize("tap", ["residual", "normed"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window", "gemma2", "granite"])
def test_effects_are_those_of_whole_models(architecture: str, tap: str, checkpoint: Checkpoint) -> None:
    """KL and rise of the loss; heads with a cap or a divisor too."""
    directory = checkpoint(architecture)
    judge = judged(PartialReplacement(load_model(directory), MAPS, tap))
    alone = judge.alone(quiet)
    for replaced_set, found in [*(((i,), alone[i]) for i in range(LAYERS)), ((0, 2), judge.together((0, 2)))]:
        kl, original, ours = whole_models(directory, replaced_set, tap, EVERY)
        assert found.kl_NK.mean().item() == pytest.approx(kl, rel=2e-3)
        assert found.rise_NK.mean().item() == pytest.approx(math.log(ours / original), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_effects_in_bfloat16_are_near(architecture: str, checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint(architecture))
    wide, bf16 = (
        judged(PartialReplacement(model, MAPS, "residual", bf16_matmul=n)).alone(quiet).kl_NK.mean(0)
        for n in (False, True)
    )
    assert bf16.tolist() == pytest.approx(wide.tolist(), rel=0.05)
    assert not torch.equal(bf16, wide), "products were not in bfloat16"


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_the_gram_of_small_changes_is_their_kl(architecture: str, checkpoint: Checkpoint) -> None:
    """KL(S) = 1/2 sum of the gram over S x S for small changes: of one layer, and of two that add up."""
    model = load_model(checkpoint(architecture))
    judge = judged(PartialReplacement(model, MAPS, "residual"))
    changes = 1e-2 * torch.randn(
        judge.parts[0], 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    changes[:, 2] = changes[:, 0] + changes[:, 1]
    found = judge._effects(changes, pulled=True)
    gram, kl = found.gram(found), found.kl_NK.double().mean(0)
    assert (gram.diagonal() / 2).tolist() == pytest.approx(kl.tolist(), rel=0.05)
    assert found.square_NK.mean(0).tolist() == pytest.approx(gram.diagonal().tolist(), rel=1e-3)
    assert judge._effects(changes, pulled=False).square_NK.equal(found.square_NK)
    assert gram[2, 2].item() == pytest.approx(gram[:2, :2].sum().item(), rel=1e-3)
    assert found[2].gram(found)[0].tolist() == pytest.approx(gram[2].tolist(), rel=1e-5)


def test_an_order_goes_on_as_if_made_at_once_and_a_shorter_one_is_its_front(checkpoint: Checkpoint) -> None:
    switched = PartialReplacement(load_model(checkpoint("llama")), MAPS, "residual")
    whole = Search(judged(switched), (), even, quiet).extend(2)
    first = Search(judged(switched), (), even, quiet).extend(1)
    kept = tuple(read_record(Point, json.loads(json.dumps(dataclasses.asdict(step)))) for step in first)
    assert kept == first == whole[:1]
    assert Search(judged(switched), kept, even, quiet).extend(2) == whole


class Planted(Judge):
    """A judge of layers whose changes add up.

    excess: what two layers of a set cost beyond that. directions: of each layer's change; by default all are
    orthogonal, and prices add up.
    """

    def __init__(
        self, quality_losses: Sequence[float], excess: Mapping[frozenset[int], float] | None = None,
        directions: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        self.quality_losses, self.excess = torch.tensor(quality_losses), dict(excess or {})
        self.directions = list(directions or range(len(quality_losses)))
        self.num_layers, self.parts = len(quality_losses), [1, 1]
        self.passes: list[tuple[int, ...]] = []

    def alone(self, progress: Any) -> Effects:
        progress(self.num_layers, self.num_layers)
        return self._effects([(i,) for i in range(self.num_layers)])

    def together(self, replaced_set: Collection[int]) -> Effects:
        self.passes.append(tuple(replaced_set))
        return self._effects([tuple(replaced_set)])

    def _effects(self, replaced_sets: Sequence[tuple[int, ...]]) -> Effects:
        change = torch.zeros(2, len(replaced_sets), self.num_layers)
        beyond = torch.zeros(2, len(replaced_sets))
        for k, replaced_set in enumerate(replaced_sets):
            for i in replaced_set:
                change[:, k, self.directions[i]] += (2 * self.quality_losses[i]).sqrt()
            beyond[:, k] = sum(v for pair, v in self.excess.items() if pair <= set(replaced_set))
        kl = change.square().sum(2) / 2 + beyond
        return Effects(change, kl, kl, change.square().sum(2), change)


def test_the_estimate_alone_orders_layers_whose_changes_add_up() -> None:
    judge = Planted([0.05, 0.01, 0.04, 0.02, 0.03])
    steps = Search(judge, (), even, quiet).extend(4)
    assert steps[-1].layers == (1, 3, 4, 2)
    assert judge.passes == [(1, 3), (1, 3, 4), (1, 3, 4, 2)]  # one pass a step, none for the first
    assert [step.loss for step in steps] == pytest.approx([0.01, 0.03, 0.06, 0.10])
    assert steps[0].losses == steps[0].rises == pytest.approx((0.01, 0.01))
    assert steps[0].worst_increase == pytest.approx(math.expm1(0.01))


def test_the_estimate_knows_which_changes_go_together() -> None:
    """Layers 0 and 1 change the output alike, so both cost four times one of them; no pass has to find this out."""
    judge = Planted([0.010, 0.011, 0.012, 0.013], directions=[0, 0, 1, 2])
    assert Search(judge, (), even, quiet).extend(3)[-1].layers == (0, 2, 3)
    assert judge.passes == [(0, 2), (0, 2, 3)]


def test_neighbours_that_cost_more_together_are_found_out_by_a_true_pass() -> None:
    judge = Planted([0.01, 0.012, 0.02, 0.03], {frozenset((0, 1)): 0.05})
    assert Search(judge, (), even, quiet).extend(3)[-1].layers == (0, 2, 3)
    assert judge.passes[:2] == [(0, 1), (0, 2)]
    assert (0, 2, 1) not in judge.passes  # what was found out counts against layer 1 from then on


def test_no_layer_is_tried_whose_estimate_is_worse_than_the_best_one_tried() -> None:
    """The layer tried last was a bad one, and does not count."""
    judge = Planted([0.01, 0.02, 0.025, 0.04], {frozenset((0, 1)): 0.007, frozenset((0, 2)): 0.1})
    assert Search(judge, (), even, quiet).extend(2)[-1].layers == (0, 1)
    assert judge.passes == [(0, 1), (0, 2)]


def test_at_most_some_layers_are_tried_at_a_step() -> None:
    excess = {frozenset((0, k)): 1.0 for k in range(1, 6)}
    judge = Planted([0.01, 0.02, 0.021, 0.022, 0.023, 0.024], excess)
    assert Search(judge, (), even, quiet).extend(2)[-1].layers == (0, 1)
    assert len(judge.passes) == greedy.TRIES


def test_the_worst_text_counts_most() -> None:
    point = Point((0,), (0.06, 0.02), (0.02, 0.06))
    assert point.losses == pytest.approx((0.04, 0.04)) and point.loss == pytest.approx(0.04)
    for rises in ((0.02, 0.06), (0.06, 0.02)):
        assert Point((0,), (0.06, 0.02), rises).worst_increase == pytest.approx(math.expm1(0.06))
    even, uneven = (Point((0,), kl, kl) for kl in ((0.05, 0.05), (0.01, 0.09)))
    assert even.loss < uneven.loss < 0.09
    assert Point((0,), (0.1, math.nan), (0.1, 0.1)).loss == math.inf


def test_what_saves_more_may_lose_more() -> None:
    """Twice the KL is for four times the work that the whole set saves."""
    for work, first in ((3.9, 1), (4.1, 0)):

        def saving(gone: Sequence[int], work: float = work) -> float:
            return sum(work if i == 0 else 1.0 for i in gone)

        assert Search(Planted([0.2, 0.1]), (), saving, quiet).extend(1)[-1].layers == (first,)


def test_the_model_comes_back_as_it_was(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    modules, layers = list(model.modules()), list(model.model.layers)
    Search(judged(PartialReplacement(model, MAPS, "residual")), (), even, quiet).extend(2)
    assert list(model.modules()) == modules
    assert list(model.model.layers) == layers
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_maps_that_are_not_finite_are_left_or_named(checkpoint: Checkpoint) -> None:
    bad = {i: Linear(MAPS[i].weight * float("inf"), MAPS[i].bias) for i in range(LAYERS)}
    model = load_model(checkpoint("llama"))
    steps = Search(judged(PartialReplacement(model, {**bad, 1: MAPS[1]}, "residual")), (), even, quiet).extend(1)
    assert steps[-1].layers == (1,)
    with pytest.raises(NblError, match="layer 0 gives logits that are not finite"):
        Search(judged(PartialReplacement(model, bad, "residual")), (), even, quiet)


def test_layers_are_judged_on_another_text_too(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = opened(run, compute_dtype="auto", select="efficient")
    seen: list[Any] = []
    bfloat16: list[bool] = []

    class SeenError(Exception):
        pass

    def note(switched: Any, texts: Any) -> None:
        seen.append(torch.cat(texts[:-1]))  # without the passages that occur twice
        bfloat16.append(switched._bf16_matmul)
        raise SeenError

    monkeypatch.setattr("nbl_export.methods.linear.order.Judge", note)
    for native in (True, False):  # products of bfloat16, in which trials are computed where they are
        monkeypatch.setattr("nbl_export.model.bfloat16.has_native_bf16", lambda _device, native=native: native)
        job.bf16_matmul.forget()
        with pytest.raises(SeenError):
            Selection(choice_of(job)).order(1)
    assert bfloat16 == [True, False]
    windows = seen[0]
    recent_tokens, second = read(run / TEXT_FILE, "selection"), read(run / TEXT_FILE, "second.selection")
    half = len(windows) // 2
    assert windows[:half].tolist() == recent_tokens[:half].tolist()
    others = [tuple(row) for row in windows[half:].tolist()]
    assert len(set(others)) == half
    assert set(others) <= {tuple(row) for row in second.tolist()}
