"""Gradients of a distillation: each row has its own, of KL and of the hidden states on the way, clipped one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export import narrow
from nbl_export.checkpoint import load_model
from nbl_export.distill import DistillSettings, _Training
from nbl_export.distill_model import Lesson, Twin, _distance
from nbl_export.distributed import ALONE
from nbl_export.linearize import linearize
from nbl_export.records import AffineMap

IDS = torch.arange(2, 98).view(3, 32)
Make = Callable[..., Twin]


@pytest.fixture
def twin(checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, AffineMap]]) -> Make:
    """(rank, architecture) -> original and student with maps in layers 0 and 2, whose deltas are not nothing."""

    def make(rank: int | None = 2, architecture: str = "llama") -> Twin:
        made = Twin(load_model(checkpoint(architecture)), random_maps(0, 2), "normed", "fp32", rank, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.trained.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return made

    return make


def _by_itself(twin: Twin, ids_T: torch.Tensor, weight: float) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients of one row, from the maps that all rows share, two whole models and autograd."""
    lesson = twin.lesson(ids_T[None], training=True)
    with twin.student(), twin._watch(range(1, len(twin.layers))) as seen:
        last = twin.decoder(inputs_embeds=lesson.entering, use_cache=False).last_hidden_state
    target, ours = (twin.model.lm_head(h).log_softmax(-1) for h in (lesson.last, last))
    kl = (target.exp() * (target - ours)).sum(-1).mean()
    apart = torch.stack([_distance(a, b)[0] for a, b in zip(seen, lesson.middle, strict=True)]).mean()
    parameters = twin.trained
    found = torch.autograd.grad(kl + weight * apart, list(parameters.values()))
    return dict(zip(parameters, found, strict=True)), kl.item()


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("rank", [2, None])
def test_each_row_has_the_gradients_that_it_has_alone(twin: Make, rank: int | None, weight: float) -> None:
    made = twin(rank)
    found, kl_B = made.gradients(made.lesson(IDS, training=True), weight)
    assert found.keys() == made.trained.keys()
    for row, ids_T in enumerate(IDS):
        expected, kl = _by_itself(made, ids_T, weight)
        assert kl_B[row].item() == pytest.approx(kl, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][row], gradient, rtol=2e-3, atol=1e-6)
    assert all(module.linear.rows is None for module in made.affine.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "granite"])
def test_states_on_the_way_are_those_of_the_whole_models(twin: Make, architecture: str) -> None:
    made = twin(2, architecture)
    lesson = made.lesson(IDS, training=True)
    with torch.no_grad():
        states = made.model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(lesson.middle) == len(made.layers) - 1
    for ours, theirs in zip((lesson.entering, *lesson.middle), states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(lesson.last, states[-1])
    assert not made.lesson(IDS).middle


def test_held_back_kl_is_that_of_the_merged_maps(twin: Make) -> None:
    made = twin(2)
    lesson, maps = made.lesson(IDS), made.maps()
    with torch.no_grad():
        target = made.model(IDS, use_cache=False).logits.log_softmax(-1)
        ours = linearize(made.model, maps, "normed")(IDS, use_cache=False).logits.log_softmax(-1)
    assert made.held_kl(lesson) == pytest.approx((target.exp() * (target - ours)).sum(-1).mean().item(), rel=1e-4)


def test_the_distance_is_of_directions() -> None:
    state = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    scaled = state * torch.tensor([3.0, 500.0])[:, None, None]
    torch.testing.assert_close(_distance(state, scaled), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(_distance(state, -state), torch.full((2,), 4.0), atol=1e-4, rtol=0)


def test_a_wild_row_does_not_drown_the_others(twin: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are clipped to norm 1 and averaged; a small one stays what it is."""
    made = twin(2)
    given: dict[str, Any] = {name: torch.zeros(2, *p.shape) for name, p in made.trained.items()}
    first, second = list(given)[:2]
    given[first][0].view(-1)[0] = 1e6
    given[second][1].view(-1)[0] = 0.5
    monkeypatch.setattr(made, "gradients", lambda _lesson, _weight: (given, torch.tensor([1.0, 2.0])))
    training = _Training(made, DistillSettings(), [], ALONE)
    training.advance(Lesson(torch.empty(2, 1, 1), torch.empty(2, 1, 1)))
    assert made.trained[first].grad is not None and made.trained[second].grad is not None
    assert made.trained[first].grad.view(-1)[0].item() == pytest.approx(0.5)
    assert made.trained[second].grad.view(-1)[0].item() == pytest.approx(0.25)
    assert training.result.train_kl == [1.5]


def test_narrow_weights_are_what_autocast_would_make(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad(), narrow.products(model.device, True):
        expected = model(IDS, use_cache=False).logits
    weights = narrow.Weights(model)
    with weights.used(), narrow.products(model.device, True), torch.no_grad():
        assert model.lm_head.weight.dtype == torch.bfloat16 != embeddings.dtype
        assert model.get_input_embeddings().weight is embeddings
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
