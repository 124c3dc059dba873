"""bfloat16 products of the model: asked for, chosen or refused; sums stay exact, and kinds of sums do not mix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import NblError
from nbl_export.methods import lmmse
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.model import bfloat16
from tests.command import assert_refused, configured, keys, nbl, snapshot, stage_lines
from tests.tiny import HIDDEN, VOCAB

pytestmark = pytest.mark.job

Checkpoint = Callable[[str], Path]
CPU = torch.device("cpu")
IDS = torch.from_numpy(np.random.default_rng(0).integers(2, VOCAB, (32, 64)))


def moments(model: Any, tap: str, *, bf16: bool) -> dict[int, lmmse.Moments]:
    taps = tuple(dict.fromkeys(("residual", tap)))
    with collect.Collection(model, taps, bf16=bf16) as found:
        found.begin(IDS)
        found.add(IDS)
    return {i: found.layer(i)[tap].moments() for i in range(found.num_layers)}


@pytest.fixture(params=[True, False], ids=["native", "none"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(bfloat16, "has_native_bf16", lambda _device: request.param)
    return bool(request.param)


def test_auto_is_what_the_processor_has(native: bool) -> None:
    assert bfloat16.use_bf16("auto", CPU) is native
    assert bfloat16.use_bf16("float32", CPU) is False
    if native:
        assert bfloat16.use_bf16("bfloat16", CPU) is True
    else:
        with pytest.raises(NblError, match=r"key compute_dtype bfloat16: this processor has no bfloat16 products"):
            bfloat16.use_bf16("bfloat16", CPU)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_maps_of_bfloat16_products_are_near(architecture: str, tap: str, checkpoint: Checkpoint) -> None:
    """Products have 8 bits, so rows differ by 2^-9 of themselves; sums of them are float64 as always."""
    model = load_model(checkpoint(architecture))
    wide, bf16 = (moments(model, tap, bf16=bf16) for bf16 in (False, True))
    for a, b in zip(wide.values(), bf16.values(), strict=True):
        assert b.xx.dtype == b.yx.dtype == torch.float64
        assert not torch.equal(a.yy, b.yy), "products were not in bfloat16"
        assert (a.yx - b.yx).norm() <= 0.02 * a.yx.norm()
        error_of_a, error_of_b = (lmmse.score(m, 0).nmse for m in (a, b))
        assert error_of_b == pytest.approx(error_of_a, abs=0.01)


def test_sums_are_the_products_of_the_rows_that_the_model_made(checkpoint: Checkpoint) -> None:
    """The sums themselves are not in bfloat16: they are those of the rows, in float64, to 1e-6."""
    model = load_model(checkpoint("llama"))
    rows: list[torch.Tensor] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda _m, args: rows.append(args[0].reshape(-1, HIDDEN).double()))
    with torch.inference_mode(), bfloat16.bf16_autocast(CPU, True):
        model.get_decoder()(input_ids=IDS, use_cache=False)
    handle.remove()
    found = moments(model, "residual", bf16=True)[1]
    expected = rows[0].T @ rows[0]
    assert (found.xx - expected).norm() <= 1e-6 * expected.norm()


def test_bfloat16_where_there_is_none_is_refused_before_any_work(
    run: Path, same: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bfloat16, "has_native_bf16", lambda _device: False)
    before = snapshot(run)
    for given in (same, ("calibrate", *same[:4])):
        for output in (run, tmp_path / "new"):
            done = nbl(*given, *keys(compute_dtype="bfloat16"), "--output", output)
            assert_refused(done, 1, "key compute_dtype bfloat16: this processor has no bfloat16 products", "use auto")
    assert snapshot(run) == before and not (tmp_path / "new").exists()
    half = configured(compute_dtype="half")
    assert_refused(nbl(*same, *half, "--output", run), 2, "auto, float32, bfloat16, not 'half'")


def test_the_manifest_says_what_products_were_and_auto_moves_with_the_run(
    native: bool, same: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("calibrate", *same[:4], "--calibration-tokens", "512", *keys(context=64), "--output", tmp_path / "run")
    assert nbl(*given).status == 0
    found: dict[str, Any] = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert found["calibration"]["products"] == ("bfloat16" if native else "float32")
    monkeypatch.setattr(
        bfloat16, "has_native_bf16", lambda _device: not native
    )  # the same directory on another machine
    assert stage_lines(nbl(*given)) == {"calibrate": "reused"}
