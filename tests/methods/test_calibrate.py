"""Moments from hooks: right rows, float64 quality from float32 products, bounded memory, exact files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods import collector, lmmse
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.methods.lmmse import Moments
from nbl_export.methods.sums import Accumulator, Sums
from nbl_export.methods.sums_file import SumsWriter, open_sums
from tests.tiny import HIDDEN, LAYERS, VOCAB

Checkpoint = Callable[[str], Path]


def windows(count: int = 8, context: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (count, context)))


def nothing(_done: int, _total: int) -> None:
    pass


def float64_moments(model: Any, ids: torch.Tensor) -> list[Moments]:
    """Every activation kept, all products in float64: what must never be done with a real model."""
    xs: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    ys: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda _m, a, i=i: xs[i].append(a[0].double().flatten(0, 1))))
        hook = lambda _m, _a, out, i=i: ys[i].append(out[0].double().flatten(0, 1))  # noqa: E731
        handles.append(layer.self_attn.register_forward_hook(hook))
    with torch.inference_mode():
        model.model(ids)
    for handle in handles:
        handle.remove()
    pairs = [(torch.cat(x), torch.cat(y)) for x, y in zip(xs, ys, strict=True)]
    return [Moments(len(x), x.sum(0), y.sum(0), x.T @ x, y.T @ x, y.T @ y) for x, y in pairs]


def test_moments_are_those_of_all_activations(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    found, expected = collect.collect(model, windows(), nothing)["residual"], float64_moments(model, windows())
    assert [m.count for m in found.values()] == [windows().numel()] * LAYERS
    for a, b in zip(found.values(), expected, strict=True):
        for name in ("x_sum", "y_sum", "xx", "yx", "yy"):
            difference = getattr(a, name) - getattr(b, name)
            assert difference.abs().max() <= 1e-5 * getattr(b, name).abs().max()


def test_normed_tap_sees_what_attention_sees(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    found = collect.collect(model, windows(), nothing, ("residual", "normed"))
    seen: list[torch.Tensor] = []
    model.model.layers[1].input_layernorm.register_forward_hook(lambda _m, _a, out: seen.append(out.double()))
    with torch.inference_mode():
        model.model(windows())
    torch.testing.assert_close(found["normed"][1].x_sum, seen[0].flatten(0, 1).sum(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found["normed"][1].x_sum, found["residual"][1].x_sum)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 2), (8, 3), (9, 64), (130, 5)])
def test_sums_of_any_shape(rows: int, size: int) -> None:
    """Fewer columns than parts of X'X, fewer rows than are summed at once, and what is left over of both."""
    generator = torch.Generator().manual_seed(rows)
    x, y = (torch.randn(rows, size, generator=generator) for _ in range(2))
    accumulator = Accumulator()
    accumulator.start(*torch.zeros(2, size), *torch.ones(2, size))
    accumulator.update(x, y)
    found, (x, y) = accumulator.sums(), (x.double(), y.double())
    for name, sums in {"x_sum": x.sum(0), "y_sum": y.sum(0), "xx": x.T @ x, "yx": y.T @ x, "yy": y.T @ y}.items():
        torch.testing.assert_close(getattr(found, name), sums, rtol=1e-5, atol=1e-4)


def test_maps_agree_with_a_float64_fit_despite_massive_activations() -> None:
    """Residual rows like a real model's: a few tokens with a thousand times the norm, correlated directions."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(HIDDEN, HIDDEN, generator=generator) / 4
    accumulator = Accumulator()
    kept = []
    for _ in range(6):
        x = torch.randn(4096, HIDDEN, generator=generator) @ mix + torch.linspace(-3, 3, HIDDEN)
        x[::500, 5] += 25_000
        x[::500, 9] -= 900
        y = torch.tanh(x @ mix) + 0.3 * torch.randn(4096, HIDDEN, generator=generator)
        accumulator.update(x, y)
        kept.append((x.double(), y.double()))
    x64, y64 = (torch.cat(part) for part in zip(*kept, strict=True))
    exact = Moments(len(x64), x64.sum(0), y64.sum(0), x64.T @ x64, y64.T @ x64, y64.T @ y64)
    ours, theirs = lmmse.fit(accumulator.sums().moments(), 0), lmmse.fit(exact, 0)
    error = np.linalg.norm(ours.weight - theirs.weight) / np.linalg.norm(theirs.weight)
    assert error < 1e-5  # 9e-5 without the float64 rows, 1.2e-5 without the shift, 4e-3 without both


def test_logits_are_never_computed(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the language-model head ran"))
    collect.collect(model, windows(), nothing)


def test_hooks_are_gone_afterwards(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    collect.collect(model, windows(), nothing)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_progress_counts_every_token(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "BATCH_TOKENS", 64)
    seen: list[tuple[int, int]] = []
    collect.collect(load_model(checkpoint("llama")), windows(5, 32), lambda d, t: seen.append((d, t)))
    assert seen == [(64, 160), (128, 160), (160, 160)]


def test_nan_weights_are_named_by_layer(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NblError, match="layer 2"):
        collect.collect(model, windows(), nothing)


def test_file_round_trip_is_exact(checkpoint: Checkpoint, tmp_path: Path) -> None:
    taps, path = ("residual", "normed"), tmp_path / "m.safetensors"
    with collect.Collection(load_model(checkpoint("llama")), taps) as found:
        found.add(windows())
    found.save(path, {"done": 1, "identity": {"batches": 1}})
    file = open_sums(path)
    file.check()
    file.require(found.shapes)
    for i in range(LAYERS):
        for tap, sums in found.layer(i).items():
            back = collect.read_sums(file, i, tap)
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(back, n))) for n, v in vars(sums).items()
            )


def test_sums_of_an_unfinished_calibration_are_refused(tmp_path: Path) -> None:
    path, one = tmp_path / "m.safetensors", torch.ones(1, dtype=torch.float64)
    sums = Sums(1, *[one] * 6, *[one.view(1, 1)] * 3)
    tensors = {f"layers.0.normed.{name}": value for name, value in sums.tensors().items()}
    for done in (1, 2):
        facts = {"count": 1, "done": done, "identity": {"batches": 2}}
        with SumsWriter(path, facts, {name: value.shape for name, value in tensors.items()}) as writer:
            writer.write(tensors)
        if done == 2:
            assert collect.read_sums(open_sums(path), 0, "normed") == sums
        else:
            assert open_sums(path, whole=False).facts["done"] == done
            with pytest.raises(CorruptError, match="not finished"):
                open_sums(path)


def written(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A finished file of sums that are zeros."""
    with SumsWriter(folder / "sums", {"count": 1, "done": 1, "identity": {"batches": 1}}, shapes) as writer:
        writer.write({name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()})
    return folder / "sums"


@pytest.mark.parametrize("other", [{"a": (2,)}, {"a": (2,), "b": (1, 3)}, {"a": (2,), "b": (3, 1), "c": (1,)}], ids=str)
def test_a_file_that_does_not_hold_exactly_the_sums_is_refused(
    other: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    wanted = {"a": (2,), "b": (3, 1)}
    open_sums(written(tmp_path, wanted)).require(wanted)
    with pytest.raises(CorruptError, match="holds other sums than its model has"):
        open_sums(written(tmp_path, other)).require(wanted)


GOOD = {"identity": {"batches": 4}, "done": 2, "count": 8, "sha256": "x"}


@pytest.mark.parametrize(
    "facts",
    ["[" * 200_000, "[]", "null", json.dumps({**GOOD, "identity": []}), json.dumps({**GOOD, "sha256": None}),
     *(json.dumps({**GOOD, "count": wrong}) for wrong in (math.inf, math.nan, 0, -1, "8", None, True, 2.5, 1 << 64)),
     *(json.dumps({**GOOD, "done": wrong}) for wrong in (None, [1], math.inf, "x", 0, -3, 5, 10**9))],
)  # fmt: skip
def test_facts_of_a_stranger_are_compared(facts: str, tmp_path: Path) -> None:
    """The metadata of a file is text, which may hold JSON of any kind."""
    save_file({"a": torch.zeros(1)}, tmp_path / "sums", {"sums": json.dumps(GOOD)})
    assert open_sums(tmp_path / "sums", whole=False).count == 8
    save_file({"a": torch.zeros(1)}, tmp_path / "sums", {"sums": facts})
    with pytest.raises(CorruptError, match=r"is no file of sums .*; run calibrate again"):
        open_sums(tmp_path / "sums", whole=False)


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CorruptError, match=r"m\.safetensors"):
        open_sums(tmp_path / "m.safetensors")


def test_a_file_whose_numbers_were_changed_is_refused(tmp_path: Path) -> None:
    """Also behind the first megabyte, which is hashed at once."""
    path = written(tmp_path, {"a": (2,), "b": (1 << 17, 1)})
    open_sums(path).check()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorruptError, match="its content is not what was written; run calibrate again"):
        open_sums(path).check()
