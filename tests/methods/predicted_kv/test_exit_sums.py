"""Moments of candidate exit layers: direct arithmetic, one pass with others, resume, and what is fitted to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods import collector
from nbl_export.methods.checkpoint.load import load_model, read_spec
from nbl_export.methods.checkpoint.source import resolve
from nbl_export.methods.predicted_kv import sums as exits
from nbl_export.methods.predicted_kv.candidates import Exits
from nbl_export.methods.predicted_kv.module import features
from nbl_export.methods.predicted_kv.sums import ExitSums, fit, maps_of, own_map
from nbl_export.methods.sums_file import open_sums
from nbl_export.records.inputs import Lazy
from nbl_export.run.stages import calibrate as stage
from nbl_export.run.stages import common
from tests.tiny import EPSILON, HEAD_DIM, HIDDEN, KV_HEADS, LAYERS, VOCAB

WIDTH = KV_HEADS * HEAD_DIM


def windows(count: int, tokens: int = 48) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(2).integers(2, VOCAB, (count, tokens)))


@contextmanager
def watched(model: Any) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within: streams "x0" and outputs of products "k1", "v1", in float64, without the first row of each window."""
    seen: dict[str, list[torch.Tensor]] = {}

    def stream(index: int) -> Any:
        def take(_layer: Any, args: Any) -> None:
            both = features(args[0].double(), EPSILON)[:, 1:]
            seen.setdefault(f"x{index}", []).append(both.flatten(0, 1))

        return take

    def product(name: str) -> Any:
        return lambda _m, _a, out: seen.setdefault(name, []).append(out[:, 1:].double().flatten(0, 1))

    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        handles.append(layer.register_forward_pre_hook(stream(index)))
        handles.append(layer.self_attn.k_proj.register_forward_hook(product(f"k{index}")))
        handles.append(layer.self_attn.v_proj.register_forward_hook(product(f"v{index}")))
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "olmo2", "nemotron"])
def test_sums_are_those_of_float64(
    name: str, bf16: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "_BLOCK", 60)  # of 94 rows of a batch
    model, text = load_model(checkpoint(name)), windows(6)
    sums = ExitSums(model, (0, 1), bf16=bf16)
    with sums, watched(model) as seen:
        sums.begin(text)
        for part in text.split(2):
            sums.add(part)
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    assert sums.count == 6 * 47 == len(rows["x0"])
    for exit_layer in (0, 1):
        centred = {name: values - values.mean(0) for name, values in rows.items()}
        x, held = centred[f"x{exit_layer}"], {key: value / sums.count for key, value in sums.sums.items()}
        mean = held[f"exits.{exit_layer}.sum"]
        close(mean + sums.sums[f"exits.{exit_layer}.ref"], rows[f"x{exit_layer}"].mean(0))
        close(held[f"exits.{exit_layer}.xx"] - torch.outer(mean, mean), x.T @ x / len(x))
        above = sums.shape.above(exit_layer)
        assert above[0] == exit_layer + (name not in ("olmo2", "nemotron"))  # else the first one has an exact map
        for layer in above:
            y = torch.cat([centred[f"k{layer}"], centred[f"v{layer}"]], 1)
            mean_y = held[f"layers.{layer}.sum"]
            close(held[f"exits.{exit_layer}.yx"][layer - above[0]] - torch.outer(mean_y, mean), y.T @ x / len(x))


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-6 * float(right.abs().max()))


def summed(model: Any, text: torch.Tensor) -> ExitSums:
    """The sums of exit layer 1."""
    with ExitSums(model, (1,)) as sums:
        sums.begin(text)
        sums.add(text)
    return sums


class KilledError(Exception):
    pass


def collected(checkpoint: Path, out: Path, text: torch.Tensor, dies: int = 0) -> int:
    """The batches that the stage goes on after; it dies behind a batch, if one is named, before it saves its sums."""
    model = load_model(checkpoint)
    said, batch = list[str](), itertools.count(1)

    def progress(*_: int) -> None:
        if next(batch) == dies:
            raise KilledError

    ui = SimpleNamespace(say=said.append, task=lambda _title: nullcontext(progress))
    run = SimpleNamespace(partial=lambda _name: out / "partial", manifest={"calibration": {}})
    given: dict[str, Any] = {
        "windows": Lazy("", lambda: text), "model": Lazy("", lambda: model), "shortage": Lazy("", lambda: ""),
        "device": Lazy("", lambda: model.device), "checkpoint": Lazy("", lambda: checkpoint),
        "asked_device": Lazy("", lambda: "cpu"),
    }  # fmt: skip
    out.mkdir(exist_ok=True)
    place: Any = SimpleNamespace(run=run, ui=ui)
    spec = read_spec(resolve(str(checkpoint)))
    with suppress(KilledError):
        stage.run(
            stage.CalibrateInputs("model", method="predicted_kv", collected=Exits((0, 2), 48),
                                  compute_dtype="float32", spec=spec, **given),
            place, out,
        )  # fmt: skip
    return int(said[0].split()[2]) if said else 0


def test_a_stage_that_is_killed_again_and_again_counts_each_batch_once(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SECONDS", "_SHARE"):
        monkeypatch.setattr(common, name, 0.0)
    monkeypatch.setattr(collector, "BATCH_TOKENS", 48)
    model, text = checkpoint("llama"), windows(6)
    assert collected(model, tmp_path / "whole", text) == 0
    assert [collected(model, tmp_path / "killed", text, dies) for dies in (3, 2, 0)] == [0, 2, 3]
    whole, killed = (tmp_path / name / "sums.safetensors" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert collected(model, tmp_path / "killed", windows(5)) == 0  # another text


def test_a_planted_relation_is_found(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(checkpoint("llama"))
    rng, seen = np.random.default_rng(0), dict[str, torch.Tensor]()
    planted = torch.from_numpy(rng.normal(size=(2 * WIDTH, 2 * HIDDEN))).float()
    bias = torch.from_numpy(rng.normal(size=2 * WIDTH)).float()
    layers = model.get_decoder().layers
    layers[1].register_forward_pre_hook(lambda _l, args: seen.update(x=args[0]))
    for half, product in enumerate((layers[2].self_attn.k_proj, layers[2].self_attn.v_proj)):
        product.register_forward_hook(
            lambda _m, _a, _out, half=half: (features(seen["x"], EPSILON) @ planted.T + bias).chunk(2, -1)[half]
        )
    sums = summed(model, windows(16))
    found = fit(sums.shape, sums.sums.__getitem__, sums.count, 1, 7)
    assert list(found) == [2]
    assert (found[2].exit_layer, found[2].recent_tokens, found[2].epsilon) == (1, 7, EPSILON)
    np.testing.assert_allclose(found[2].weight, planted, atol=1e-3)
    np.testing.assert_allclose(found[2].bias, bias, atol=1e-3)
    sums.save(tmp_path / "sums", {"identity": {"batches": 1}, "done": 1})
    maps = maps_of(model, open_sums(tmp_path / "sums"), (1,), 1, 7)
    np.testing.assert_array_equal(maps[1].weight, own_map(model, 1, 1, 7).weight)
    np.testing.assert_array_equal(maps[2].weight, found[2].weight)


def test_a_file_of_other_sums_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(checkpoint("llama"))
    summed(model, windows(2)).save(tmp_path / "sums", {"identity": {"batches": 1}, "done": 1})
    file = open_sums(tmp_path / "sums")
    for candidates in ((0, 1), (2,)):
        with pytest.raises(CorruptError, match=r"other sums than its model has .*; run calibrate again"):
            maps_of(model, file, candidates, 1, 7)


def test_impossible_exit_layers_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    for wrong in ((2, 1), (1, 1), (LAYERS,), (-1,)):
        with pytest.raises(NblError, match="are not those of 3 layers"):
            ExitSums(model, wrong)
    model.get_decoder().layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(NblError, match=r"layer 1: .* no products of keys"):
        ExitSums(model, (1,))


def test_sums_that_are_not_finite_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    sums = summed(model, windows(6))
    sums.sums["exits.1.yx"][0, 3, 5] = torch.nan
    with pytest.raises(NblError, match="layer 2: its activations hold NaN"):
        fit(sums.shape, sums.sums.__getitem__, sums.count, 1, 4)
