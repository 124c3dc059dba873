"""Predicted KV and values: NumPy against torch, the file, and the rows that a prompt needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods.maps_file import load_maps, save_maps
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of
from nbl_export.methods.predicted_kv.module import features
from nbl_export.methods.rows import Need, rows_needed

SIZE, KEYS = 12, 4


def predicted(exit_layer: int = 1, recent_tokens: int = 3) -> PredictedKV:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(2 * KEYS, 2 * SIZE)).astype(np.float32)
    return PredictedKV(weight, rng.normal(size=2 * KEYS).astype(np.float32), SIZE, exit_layer, recent_tokens, 1e-3)


def test_numpy_and_torch_agree_and_a_file_keeps_the_numbers(tmp_path: Path) -> None:
    mixer = predicted()
    save_maps({2: mixer}, tmp_path / "maps.safetensors")
    again = load_maps(tmp_path / "maps.safetensors", (2,))[2]
    assert (again.exit_layer, again.recent_tokens, again.inputs) == (1, 3, SIZE)  # type: ignore[attr-defined]
    assert again.epsilon == np.float32(1e-3)  # type: ignore[attr-defined]
    x_BTD = np.random.default_rng(1).normal(size=(2, 5, SIZE)).astype(np.float32)
    found = again.module().predict(torch.from_numpy(x_BTD))
    for ours, value in zip(mixer(x_BTD), found, strict=True):
        np.testing.assert_allclose(ours, value.detach().numpy(), atol=1e-5)
    large = torch.from_numpy(300 * x_BTD).half()  # its squares are beyond float16
    wide, half = (features(x, 1e-3) for x in (large.float(), large))
    torch.testing.assert_close(half, wide.half())


def test_the_token_before_is_read_one_row_up() -> None:
    x_BTD = np.random.default_rng(1).normal(size=(1, 6, SIZE)).astype(np.float32)
    changed = x_BTD.copy()
    changed[0, 2] = 1
    keys, others = (predicted()(x)[0] for x in (changed, x_BTD))
    long_range = np.abs(keys - others)
    assert (long_range[0].max(1) > 1e-3).tolist() == [False, False, True, True, False, False]


def test_a_prompt_continues_with_its_last_rows_and_the_first() -> None:
    reads = {i: predicted(2, 3).reads for i in (2, 3, 4)}
    needs = rows_needed(reads, 5)
    assert needs == (Need(None), Need(None), Need(None), Need(3, first=True), Need(3, first=True), Need(1))
    assert [need.count(100) for need in needs] == [100, 100, 100, 4, 4, 1]


@pytest.mark.parametrize("other", [(1, 4), (0, 3)])
def test_maps_of_a_model_have_one_exit_layer(other: tuple[int, int]) -> None:
    assert exit_of({2: predicted(), 1: predicted()}).recent_tokens == 3
    with pytest.raises(NblError, match="several exit layers or numbers of recent tokens"):
        exit_of({1: predicted(), 2: predicted(*other)})
