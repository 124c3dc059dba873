"""Gradients of a distillation: each row has its own, of KL and of the hidden states on the way, clipped one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.methods.base import Mixer
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.distill import teacher_student
from nbl_export.methods.distill.teacher_student import TeacherStudent, _distance, _Divergence
from nbl_export.methods.distill.training import UNLIMITED, DistillSettings, _clipped_mean, _Training
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.modules import TrainedLinear
from nbl_export.model import bfloat16
from tests.tiny import HIDDEN

IDS = torch.arange(2, 98).view(3, 32)
Make = Callable[..., TeacherStudent]


@pytest.fixture
def twin(checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]]) -> Make:
    """(rank, architecture) -> original and student with maps in layers 0 and 2, whose deltas are not nothing, and
    whose units are not 1."""

    def make(rank: int = 2, architecture: str = "llama") -> TeacherStudent:
        model, maps = load_model(checkpoint(architecture)), dict[int, Mixer](random_maps(0, 2))
        made = TeacherStudent(model, maps, "normed", "fp32", rank, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.trained.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
            for units in made.units.values():
                units.copy_(torch.tensor([0.7, 1.6]))
        return made

    return make


def _by_itself(
    twin: TeacherStudent, ids_T: torch.Tensor, weight: float, label_weight: float
) -> tuple[dict[str, torch.Tensor], float]:
    """The gradients of one row, from the maps that all rows share, two whole models and autograd."""
    teacher = twin.teacher_states(ids_T[None], training=True)
    with twin.student(), twin._watch(range(1, len(twin.layers))) as seen:
        last = twin.decoder(inputs_embeds=teacher.entering, use_cache=False).last_hidden_state
    target, ours = (twin.model.lm_head(h).log_softmax(-1) for h in (teacher.last, last))
    kl_T = (target.exp() * (target - ours)).sum(-1)[0]
    labelled_T = (1 - label_weight) * kl_T[:-1] - label_weight * ours[0, :-1].gather(1, ids_T[1:, None])[:, 0]
    loss, kl = torch.cat([labelled_T, kl_T[-1:]]).mean(), kl_T.mean()
    apart = torch.stack([_distance(a, b)[0] for a, b in zip(seen, teacher.middle, strict=True)]).mean()
    parameters = twin.trained
    found = torch.autograd.grad(loss + weight * apart, list(parameters.values()))
    return dict(zip(parameters, found, strict=True)), kl.item()


@pytest.mark.parametrize(("weight", "label_weight"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.2), (0.0, 1.0)])
def test_each_row_has_the_gradients_that_it_has_alone(twin: Make, weight: float, label_weight: float) -> None:
    made = twin()
    found, kl_B = made.gradients(made.teacher_states(IDS, training=True), weight, label_weight)
    assert found.keys() == made.trained.keys()
    for row, ids_T in enumerate(IDS):
        expected, kl = _by_itself(made, ids_T, weight, label_weight)
        assert kl_B[row].item() == pytest.approx(kl, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][row], gradient, rtol=2e-3, atol=1e-6)
    assert all(module.linear.rows is None for module in made.affine.values())


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "granite"])
def test_states_on_the_way_are_those_of_the_whole_models(twin: Make, architecture: str) -> None:
    made = twin(2, architecture)
    teacher = made.teacher_states(IDS, training=True)
    with torch.no_grad():
        states = made.model(IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(teacher.middle) == len(made.layers) - 1
    for ours, theirs in zip((teacher.entering, *teacher.middle), states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(teacher.last, states[-1])
    assert not made.teacher_states(IDS).middle


def test_the_distance_is_of_directions() -> None:
    state = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    scaled = state * torch.tensor([3.0, 500.0])[:, None, None]
    torch.testing.assert_close(_distance(state, scaled), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(_distance(state, -state), torch.full((2,), 4.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("label_weight", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loss_and_kl_are_those_of_the_logits_whatever_their_type(dtype: torch.dtype, label_weight: float) -> None:
    """Under autocast, as a training step is; two close distributions, more positions than are taken at once."""
    torch.manual_seed(0)
    target = (2 * torch.randn(130, 4096)).to(dtype)
    ours = (target + 0.1 * torch.randn(130, 4096)).to(dtype).requires_grad_()
    labels = torch.randint(4096, (129,))
    with torch.autocast("cpu", torch.bfloat16):
        loss, kl = _Divergence.apply(ours, target, labels if label_weight else None, label_weight)
    (gradient,) = torch.autograd.grad(loss, ours)
    wide = ours.detach().double().requires_grad_()
    share = target.double().log_softmax(-1)
    apart = (share.exp() * (share - wide.log_softmax(-1))).sum(-1)
    said = torch.nn.functional.cross_entropy(wide[:-1], labels, reduction="none")
    wanted = ((1 - label_weight) * apart[:-1] + label_weight * said).sum() + apart[-1]
    (expected,) = torch.autograd.grad(wanted, wide)
    assert gradient.dtype == dtype
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-3)
    assert kl.item() == pytest.approx(apart.sum().item(), rel=1e-3)
    assert (gradient - expected).norm() < 0.005 * expected.norm()


def test_the_loss_does_not_depend_on_how_many_logits_are_held(twin: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = twin()
    theirs, ours = torch.randn(2, 10, HIDDEN, generator=torch.Generator().manual_seed(2))
    expected = made._apart(theirs, ours, IDS[0, :9], 0.5)
    monkeypatch.setattr(teacher_student, "_LOGIT_ROWS", 4)
    torch.testing.assert_close(made._apart(theirs, ours, IDS[0, :9], 0.5), expected)


def test_a_wild_row_does_not_drown_the_others(twin: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are clipped to norm 1 and averaged; a small one stays what it is."""
    made = twin(2)
    given: dict[str, Any] = {name: torch.zeros(2, *p.shape) for name, p in made.trained.items()}
    first, second = list(given)[:2]
    given[first][0].view(-1)[0] = 1e6
    given[second][1].view(-1)[0] = 0.5
    monkeypatch.setattr(made, "gradients", lambda _lesson, *_weights: (given, torch.tensor([1.0, 2.0])))
    training = _Training(made, DistillSettings(), [])
    training.advance(IDS[:2])
    assert made.trained[first].grad is not None and made.trained[second].grad is not None
    assert made.trained[first].grad.view(-1)[0].item() == pytest.approx(0.5)
    assert made.trained[second].grad.view(-1)[0].item() == pytest.approx(0.25)
    assert training.result.train_kl == [1.5]


def test_gradients_of_whole_weights_are_those_that_the_deltas_have_theirs_from(twin: Make) -> None:
    """Whatever the deltas are, they are by the merged weight: the chain rule gives those of `up` and `down`."""
    made = twin()
    teacher = made.teacher_states(IDS, training=True)
    found, kl_B = made.gradients(teacher, 0.3, whole=True)
    wanted, kl = made.gradients(teacher, 0.3)
    assert found.keys() == {"0.linear.weight", "2.linear.weight"}
    torch.testing.assert_close(kl_B, kl)
    for index, module in made.affine.items():
        linear, whole = module.linear, 0.7 * found[f"{index}.linear.weight"]
        torch.testing.assert_close(wanted[f"{index}.linear.up"], whole @ linear.down.T, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(wanted[f"{index}.linear.down"], linear.up.T @ whole, rtol=2e-3, atol=1e-6)


def test_the_same_rate_changes_the_output_by_the_same_share_in_every_model() -> None:
    """A step with inputs of any size and outputs of any size: the change is that of the plain model, times the size."""
    torch.manual_seed(0)
    x = torch.randn(2, 30, 12) * torch.linspace(0.1, 3, 12)
    shares = []
    for larger, smaller in ((1.0, 1.0), (40.0, 0.01)):
        linear = torch.nn.Linear(12, 12)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(12) * smaller / larger)
            linear.bias.copy_(torch.full((12,), 0.5 * smaller))
        made = TrainedLinear(linear, 4, torch.Generator().manual_seed(3))
        made.measure(larger * x)
        before = made(larger * x).detach()
        with torch.no_grad():
            for parameter in (made.up, made.shift):
                parameter.add_(0.01)  # what a first step of Adam does, but for signs
        shares.append(((made(larger * x) - before).norm() / before.norm()).item())
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    assert 0.005 < shares[0] < 0.05


def test_units_are_measured_on_what_a_map_reads(twin: Make) -> None:
    made = twin()
    training = _Training(made, DistillSettings(), [])
    with torch.no_grad():
        made.affine["0"].linear.up.zero_()  # where aiming begins
        made.affine["0"].linear.shift.zero_()
    teacher = made.teacher_states(IDS, training=True)
    training.init_lora_from_gradient([IDS])
    linear = made.affine["0"].linear
    with torch.no_grad():
        x = made.layers[0].input_layernorm(teacher.entering)
        out, thin = linear(x).square().mean().sqrt(), (x @ linear.down.T).square().mean().sqrt()
    torch.testing.assert_close(linear.units, torch.stack([out / thin, out]))


def test_inputs_of_zeros_leave_a_map_its_units(twin: Make) -> None:
    made = twin().affine["0"].linear
    made.measure(torch.zeros(1, 3, HIDDEN))
    assert made.units.isfinite().all() and made.units[0] == 1


def test_deltas_begin_where_the_gradient_is(twin: Make) -> None:
    """The first gradient of up is as large as rank directions allow: the largest singular values of the whole one."""
    made = twin(4)
    with torch.no_grad():
        for module in made.affine.values():
            module.linear.up.zero_()
    training = _Training(made, DistillSettings(lora_rank=4, hidden_weight=0.3), [])
    batches = [IDS, IDS.flip(0) + 1]
    states = (made.teacher_states(ids, training=True) for ids in batches)
    whole = [_clipped_mean(made.gradients(teacher, 0.3, 0.1, whole=True)[0]) for teacher in states]
    training.init_lora_from_gradient(batches)
    for index in ("0", "2"):
        linear, total = made.affine[index].linear, sum(g[f"{index}.linear.weight"] for g in whole)
        assert isinstance(total, torch.Tensor)
        assert not linear.up.any()
        torch.testing.assert_close(linear.down @ linear.down.T, torch.eye(4), atol=1e-4, rtol=0)
        largest = torch.linalg.svdvals(total)[:4]
        torch.testing.assert_close((total @ linear.down.T).norm(), largest.norm(), rtol=1e-3, atol=0)


def test_a_clock_that_is_nearly_over_stops_aiming(twin: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a minute three seconds, where each batch takes one: a slow model must not spend its minutes on it."""
    made, ticks = twin(2), itertools.count()
    monkeypatch.setattr(
        "nbl_export.methods.distill.training.time", SimpleNamespace(monotonic=lambda: float(next(ticks)))
    )
    training = _Training(made, DistillSettings(UNLIMITED, minutes=1.0, lora_rank=2), [])
    left = iter([IDS] * 16)
    training.init_lora_from_gradient(left)
    assert len(list(left)) == 13


def test_a_rank_above_the_width_keeps_its_other_directions() -> None:
    """Its gradient has no more of them; initialised twice they are the same."""
    linear = torch.nn.Linear(6, 6)
    made, again = (TrainedLinear(linear, 9, torch.Generator().manual_seed(3)) for _ in range(2))
    random = made.down.detach().clone()
    gradient = torch.randn(6, 6, generator=torch.Generator().manual_seed(4))
    state = torch.get_rng_state()
    made.init_lora_from_gradient({"weight": gradient})
    assert torch.equal(torch.get_rng_state(), state)
    again.init_lora_from_gradient({"weight": gradient})
    assert torch.equal(made.down, again.down)
    assert torch.equal(made.down[6:], random[6:]) and not torch.equal(made.down[:6], random[:6])
    torch.testing.assert_close(made.down[:6] @ made.down[:6].T, torch.eye(6), atol=1e-5, rtol=0)


def test_bf16_weights_are_what_autocast_would_make(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad(), bfloat16.bf16_autocast(model.device, True):
        expected = model(IDS, use_cache=False).logits
    weights = bfloat16.Weights(model)
    with weights.used(), bfloat16.bf16_autocast(model.device, True), torch.no_grad():
        assert model.lm_head.weight.dtype == torch.bfloat16 != embeddings.dtype
        assert model.get_input_embeddings().weight is embeddings
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
    assert {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)} == before
