"""Moments of candidate exit layers: direct arithmetic, one pass with others, resume, and what is fitted to them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.methods.linear.collect import Collection
from nbl_export.methods.predicted_kv import sums as exits
from nbl_export.methods.predicted_kv.module import features
from nbl_export.methods.predicted_kv.sums import ExitSums, fit, load, maps_of
from nbl_export.methods.predicted_kv.torch_layers import own_map
from nbl_export.records.inputs import Lazy
from nbl_export.run.stages import common
from nbl_export.run.stages import exit as stage
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


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_sums_beside_a_calibration_are_those_of_float64(
    name: str, narrow: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "_BLOCK", 60)  # of 94 rows of a batch
    model, text = load_model(checkpoint(name)), windows(6)
    sums = ExitSums.of(model, (0, 1))
    with Collection(model, ("residual",), narrow=narrow) as collection, sums.attached(model):
        collection.refer(text)
        assert sums.count == 47
        sums.clear()
        assert all(value.any() == name.endswith(".ref") for name, value in sums.sums.items())
        with watched(model) as seen:
            for part in text.split(2):
                collection.add(part)
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    assert sums.count == 6 * 47 == len(rows["x0"])
    assert collection.count == 6 * 48
    for exit_layer in (0, 1):
        centred = {name: values - values.mean(0) for name, values in rows.items()}
        x, held = centred[f"x{exit_layer}"], {key: value / sums.count for key, value in sums.sums.items()}
        mean = held[f"cuts.{exit_layer}.sum"]
        close(mean + sums.sums[f"cuts.{exit_layer}.ref"], rows[f"x{exit_layer}"].mean(0))
        close(held[f"cuts.{exit_layer}.xx"] - torch.outer(mean, mean), x.T @ x / len(x))
        for layer in range(exit_layer + 1, LAYERS):
            y = torch.cat([centred[f"k{layer}"], centred[f"v{layer}"]], 1)
            mean_y = held[f"layers.{layer}.sum"]
            close(held[f"cuts.{exit_layer}.yx"][layer - exit_layer - 1] - torch.outer(mean_y, mean), y.T @ x / len(x))


def close(found: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(found, right, rtol=1e-5, atol=2e-6 * float(right.abs().max()))


def run(model: Any, text: torch.Tensor) -> None:
    with torch.inference_mode():
        model.get_decoder()(input_ids=text, use_cache=False)


class KilledError(Exception):
    pass


def collected(model: Any, out: Path, text: torch.Tensor, dies: int = 0) -> int:
    """The batches that the stage goes on after; it dies behind a batch, if one is named, before it saves its sums."""
    said, batch = list[str](), itertools.count(1)

    def progress(*_: int) -> None:
        if next(batch) == dies:
            raise KilledError

    ui = SimpleNamespace(say=said.append, task=lambda _title: nullcontext(progress))
    run = SimpleNamespace(partial=lambda _name: out / "partial", manifest={"calibration": {}})
    given = Lazy("", lambda: text), (0, 2), 48, "float32", Lazy("", lambda: model), Lazy("", lambda: "")
    out.mkdir(exist_ok=True)
    place: Any = SimpleNamespace(run=run, ui=ui)
    with suppress(KilledError):
        stage.collect(stage.ExitCalibration("model", *given), place, out)
    return int(said[0].split()[2]) if said else 0


def test_a_stage_that_is_killed_again_and_again_counts_each_batch_once(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_SECONDS", "_SHARE"):
        monkeypatch.setattr(common, name, 0.0)
    monkeypatch.setattr(collect, "_BATCH_TOKENS", 48)
    model, text = load_model(checkpoint("llama")), windows(6)
    assert collected(model, tmp_path / "whole", text) == 0
    assert [collected(model, tmp_path / "killed", text, dies) for dies in (3, 2, 0)] == [0, 2, 3]
    whole, killed = (tmp_path / name / "cuts.safetensors" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()
    assert collected(model, tmp_path / "killed", windows(5)) == 0  # another text


def test_a_planted_relation_is_found(checkpoint: Callable[[str], Path]) -> None:
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
    sums = ExitSums.of(model, (1,))
    with sums.attached(model):
        run(model, windows(16))
    found = fit(sums, 1, 7)
    assert list(found) == [2]
    assert (found[2].exit_layer, found[2].recent_tokens, found[2].epsilon) == (1, 7, EPSILON)
    np.testing.assert_allclose(found[2].weight, planted, atol=1e-3)
    np.testing.assert_allclose(found[2].bias, bias, atol=1e-3)
    maps = maps_of(model, sums, 1, 7)
    np.testing.assert_array_equal(maps[1].weight, own_map(model, 1, 7).weight)
    np.testing.assert_array_equal(maps[2].weight, found[2].weight)


def test_a_file_that_is_damaged_or_of_something_else_is_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    sums = ExitSums.of(load_model(checkpoint("llama")), (1,))
    sums.save(tmp_path / "sums", {})
    raw = (tmp_path / "sums").read_bytes()
    for damaged in (raw[:-8], raw[:-1] + b"\1", raw.replace(b'"layers\\": 3', b'"layers\\": 4'), b"", b"x" * 100):
        assert damaged != raw
        (tmp_path / "sums").write_bytes(damaged)
        with pytest.raises(CorruptError, match="run calibrate again"):
            load(tmp_path / "sums")
    with pytest.raises(CorruptError):
        load(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "reason"), [({"layers": 10**9}, "lacks layers"), ({"width": 16}, "shapes"), ({"epsilon": None}, "sizes")]
)
def test_a_file_that_says_other_sizes_is_refused(
    change: dict[str, Any], reason: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "sums"
    ExitSums.of(load_model(checkpoint("llama")), (1,)).save(path, {})
    with safe_open(path, "pt") as file:
        stated = {**json.loads(file.metadata()["exits"]), **change}
    save_file(load_file(path), path, {"exits": json.dumps(stated)})
    with pytest.raises(CorruptError, match=reason):
        load(path)


def test_impossible_cuts_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    for wrong in ((2, 1), (1, 1), (LAYERS,), (-1,)):
        with pytest.raises(NblError, match="are not those of 3 layers"):
            ExitSums.of(model, wrong)
    with pytest.raises(NblError, match="it norms queries and keys"):
        ExitSums.of(load_model(checkpoint("qwen3")), (1,))


def test_sums_that_are_not_finite_are_refused(checkpoint: Callable[[str], Path]) -> None:
    model = load_model(checkpoint("llama"))
    sums = ExitSums.of(model, (1,))
    with sums.attached(model):
        run(model, windows(6))
    sums.sums["cuts.1.yx"][0, 3, 5] = torch.nan
    with pytest.raises(NblError, match="layer 2: its activations hold NaN"):
        fit(sums, 1, 4)
