"""What linear layers of every form keep: one layer, whether it is NumPy, a torch module, a file or fitted anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.linear.method import LINEAR
from nbl_export.methods.lmmse import fit, score
from nbl_export.methods.maps_file import load_maps, maps_in, save_maps
from nbl_export.methods.modules import Wrapped
from nbl_export.methods.rows import Read
from tests.methods.test_lmmse import moments
from tests.tiny import HIDDEN, VOCAB

D = 6


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    found: np.ndarray = (np.random.default_rng(seed).standard_normal(shape) / 3).astype(np.float32)
    return found


def planted(size: int, seed: int = 0) -> dict[str, Linear]:
    """A linear layer of each form."""
    square = numbers(size, size, seed=seed)
    bias = numbers(size, seed=seed + 3)
    return {
        "linear": Linear(square, bias),
        "linear without a bias": Linear(square, np.zeros_like(bias)),
        "a bias alone": Linear(np.zeros_like(square), bias),
        "zeros": Linear.zeros(size),
    }


EVERY = planted(D)
ROWS = numbers(2, 9, D, seed=9)


def output(mixer: Any, rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = mixer(rows)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_module_computes_what_numpy_does(name: str) -> None:
    mixer, x = EVERY[name], torch.from_numpy(ROWS)
    expected = output(mixer, ROWS)
    for multiplier in (1.0, 0.5):
        with torch.no_grad():
            found, weights = mixer.module(multiplier)(x)
        assert weights is None
        np.testing.assert_allclose(found.numpy() * multiplier, expected, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_a_local_mixer_reads_its_own_token_alone(name: str) -> None:
    mixer = EVERY[name]
    changed = ROWS.copy()
    changed[:, 3] += 1
    away = np.abs(output(mixer, changed) - output(mixer, ROWS)).max((0, 2))
    assert not away[:3].any() and not away[4:].any() and mixer.reads == (Read(),)


@pytest.mark.parametrize("name", EVERY)
def test_tensors_make_the_same_mixer(name: str, tmp_path: Path) -> None:
    mixer, path = EVERY[name], tmp_path / "maps.safetensors"
    save_maps({3: mixer}, path)
    assert maps_in(path) == ((3,), "residual")
    state = {n: t.numpy() for n, t in mixer.module().state_dict().items()}
    for found in (LINEAR.from_tensors(mixer.tensors()), load_maps(path, (3,))[3], LINEAR.from_module(state)):
        assert (found.kind, found.size, found.holds_cache) == (mixer.kind, D, False)
        np.testing.assert_allclose(output(found, ROWS), output(mixer, ROWS), atol=1e-6)
    blank = LINEAR.blank(SimpleNamespace(hidden_size=D), None, None)
    blank.load_state_dict(mixer.module().state_dict())
    with torch.no_grad():
        np.testing.assert_allclose(blank(torch.from_numpy(ROWS))[0], output(mixer, ROWS), atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_stored_is_what_is_counted(name: str) -> None:
    mixer = EVERY[name]
    matrices, vectors = mixer.stored()
    assert (set(matrices), set(vectors)) == {
        "linear": ({"weight"}, {"bias"}), "linear without a bias": ({"weight"}, set()),
        "a bias alone": ({"weight"}, {"bias"}), "zeros": (set(), set()),
    }[name]  # fmt: skip
    (work,) = mixer.work()
    assert work.elements == work.multiply_adds == sum(m.size for m in matrices.values())


@pytest.mark.parametrize("name", EVERY)
def test_one_product_says_all_or_is_refused(name: str) -> None:
    mixer = EVERY[name]
    weight = mixer.product()
    assert (weight is None) == (name in ("linear", "a bias alone"))
    if weight is not None:
        np.testing.assert_allclose(ROWS @ weight.T, output(mixer, ROWS), atol=1e-6)


def rows_of(mixer: Linear, size: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, T, D], and what the mixer makes of them."""
    x = 3 * numbers(40, 30, size, seed=seed) + 1
    return torch.from_numpy(x), torch.from_numpy(output(mixer, x))


@pytest.mark.parametrize("name", EVERY)
def test_a_planted_mixer_is_fitted(name: str) -> None:
    mixer = EVERY[name]
    x, y = rows_of(mixer, D)
    found_moments = moments(x.flatten(0, 1), y.flatten(0, 1))
    bias = name != "linear without a bias"
    found = Linear(*fit(found_moments, 0, bias=bias))
    np.testing.assert_allclose(output(found, ROWS), output(mixer, ROWS), atol=2e-5)
    scored = score(found_moments, 4, bias=bias)
    constant = name == "a bias alone"  # no variance is left, or rounding errors: their share is any number
    assert scored.layer == 4 and (constant or scored.nmse < 1e-4) and -1e-9 <= scored.bound < 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_the_trained_form_begins_as_the_mixer(name: str) -> None:
    mixer = planted(HIDDEN)[name]
    trained = mixer.trained(2, torch.Generator().manual_seed(0))
    x = torch.from_numpy(numbers(2, 5, HIDDEN))
    with torch.no_grad():
        found = Wrapped(trained, 0.5)(x)[0] * 0.5
    expected = output(mixer, x.numpy())
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5, rtol=1e-5)
    again = LINEAR.from_tensors(trained.tensors())
    np.testing.assert_allclose(output(again, x.numpy()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_a_layer_of_a_model_is_calibrated_and_fitted(name: str, checkpoint: Callable[[str], Path]) -> None:
    """The law of planted attention: the torch model is calibrated, and the fit gives back the planted layer."""
    mixer = planted(HIDDEN)[name]
    model = linearize(load_model(checkpoint("llama")), {1: mixer})
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (48, 64)))
    found = collect.collect(model, ids, lambda *_: None)["residual"]
    again, rows = Linear(*fit(found[1], 1)), numbers(2, 9, HIDDEN, seed=9)
    np.testing.assert_allclose(output(again, rows), output(mixer, rows), atol=5e-3)


def cached(model: Any, ids: torch.Tensor, ends: tuple[int, ...], **given: Any) -> torch.Tensor:
    """Logits of a prefill and of steps with the cache."""
    parts, cache = [], None
    for start, end in zip((0, *ends), (*ends, ids.shape[1]), strict=True):
        mask = {name: value[:, :end] for name, value in given.items()}
        out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **mask)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", EVERY)
def test_a_padded_row_gives_what_the_row_alone_gives(name: str, checkpoint: Callable[[str], Path]) -> None:
    model = linearize(load_model(checkpoint("llama")), {i: planted(HIDDEN, i)[name] for i in (0, 2)})
    rows = [torch.arange(2, 22), torch.arange(30, 42)]
    ids = torch.stack([rows[0], torch.cat([torch.zeros(8, dtype=torch.long), rows[1]])])
    mask = torch.stack([torch.ones(20), torch.cat([torch.zeros(8), torch.ones(12)])]).long()
    with torch.inference_mode():
        for ends in ((), (14, *range(15, 20))):
            found = cached(model, ids, ends, attention_mask=mask)
            for k, row in enumerate(rows):
                alone = model(row[None], use_cache=False).logits[0]
                torch.testing.assert_close(found[k, -len(row) :], alone, rtol=1e-4, atol=2e-4)
