"""Attention as products of its own: what torch's fused operator says, and only where it may stand in for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nbl_export.distill.teacher_student import TeacherStudent
from nbl_export.mixers.linear import Linear
from nbl_export.model import bfloat16
from nbl_export.model.checkpoint.load import load_model

CPU = torch.device("cpu")
IDS = torch.arange(2, 98).view(3, 32)


def _inputs(tokens: int, groups: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 6, tokens, 16), (2, groups, tokens, 16), (2, groups, tokens, 16))
    return tuple((2 * torch.randn(s, generator=generator)).requires_grad_() for s in shapes)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever attention is computed as products."""
    calls: list[int] = []
    real = bfloat16._attention

    def noted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(bfloat16, "_attention", noted)
    return calls


@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"enable_gqa": True}])
def test_output_and_gradients_are_those_of_the_fused_operator(options: dict[str, Any], counted: list[int]) -> None:
    options = {"is_causal": True, **options}
    inputs = _inputs(32, 2 if options.get("enable_gqa") else 6)
    said = torch.randn(2, 6, 32, 16, generator=torch.Generator().manual_seed(1))
    expected = scaled_dot_product_attention(*inputs, **options)
    wanted = torch.autograd.grad(expected, inputs, said)
    with bfloat16.products(CPU, True), bfloat16.ShortAttention():
        found = scaled_dot_product_attention(*inputs, **options)
    assert counted == [1] and found.dtype == torch.bfloat16
    gradients = torch.autograd.grad(found, inputs, said.bfloat16())
    for ours, theirs in zip((found, *gradients), (expected, *wanted), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(
    ("tokens", "autocast", "options"),
    [
        (32, True, {"attn_mask": torch.ones(32, 32, dtype=torch.bool).tril()}),  # a sliding window's may differ
        (32, True, {"attn_mask": torch.ones(32, 32, dtype=torch.bool).tril().triu(-8), "is_causal": True}),
        (32, True, {"is_causal": False}),
        (32, True, {"is_causal": True, "dropout_p": 0.5}),
        (32, False, {"is_causal": True}),
        (512, True, {"is_causal": True}),
    ],
)
def test_other_attention_is_left_to_torch(
    tokens: int, autocast: bool, options: dict[str, Any], counted: list[int]
) -> None:
    inputs = _inputs(tokens, 6)
    with bfloat16.products(CPU, autocast):
        torch.manual_seed(0)
        expected = scaled_dot_product_attention(*inputs, **options)
        torch.manual_seed(0)
        with bfloat16.ShortAttention():
            found = scaled_dot_product_attention(*inputs, **options)
    assert not counted
    assert torch.equal(found, expected)


def test_training_steps_in_bfloat16_take_it_and_nothing_else_does(
    checkpoint: Callable[[str], Path], random_maps: Callable[..., dict[int, Linear]], counted: list[int]
) -> None:
    """Once a layer with attention: all of the original's, those of the student that are left."""
    model, maps = load_model(checkpoint("llama")), random_maps(0, 2)
    wide, made = (TeacherStudent(model, maps, "normed", dtype, 2, seed=0) for dtype in ("fp32", "bf16"))
    expected, _ = wide.gradients(wide.teacher_states(IDS, training=True), 0.3, 0.1)
    made.held_kl(made.teacher_states(IDS))
    assert not counted
    teacher = made.teacher_states(IDS, training=True)
    assert len(counted) == len(made.layers)
    found, _ = made.gradients(teacher, 0.3, 0.1)
    assert len(counted) == 2 * len(made.layers) - 2
    assert set(found) == set(expected)
    still = {name for name, gradient in expected.items() if not gradient.any()}
    assert still == {"0.linear.down", "2.linear.down"}  # their `up` is zeros at first
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 0.03 * gradient.norm(), name
