"""The NBL graph is compared with the original graph and its mixers: right ones pass, each planted fault is named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.methods.checkpoint import load
from nbl_export.options.options import JobOptions
from nbl_export.records.quantised import unpacked
from nbl_export.run.progress import Ui
from nbl_export.run.settled import of_run
from nbl_export.run.stages import verify
from nbl_export.run.stages.common import StageContext
from nbl_export.run_directory import RunDirectory
from nbl_export.targets.checks import MAPS
from nbl_export.verify import exporter
from nbl_export.verify.ladder import TOLERANCES

from ..command import TINY, configured, nbl
from ..jobs import until
from ..tiny import HIDDEN, VOCAB

pytestmark = pytest.mark.job

CachedHiddenStates = Callable[..., Path]
EXACT = 1e-5  # on a tiny model; 1e-4 is the gate


@pytest.fixture(scope="module")
def runs(checkpoint: Callable[[str], Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> CachedHiddenStates:
    """architecture, precision, layers, tap -> a run up to its graph, which has all logits. Never write to it."""

    @functools.cache
    def make(architecture: str, precision: str, layers: str = "1,2", tap: str = "residual") -> Path:
        out = tmp_path_factory.mktemp("coded") / "run"
        with until("rewrite"):
            done = nbl("--model", checkpoint(architecture), "--calibration", text, *TINY, "--precision", precision,
                       "--layers", layers, *configured(tap=tap, logits="all"), "--output", out)  # fmt: skip
        assert done.status == 0, done.err
        return out

    return make


def continued(run: Path) -> list[dict[str, Any]]:
    """The checks of a run directory as it is now; the quality loss, which is not gated, is left out."""
    with (
        RunDirectory(run).opened(create=False) as opened,
        mock.patch.object(verify, "quality_loss", return_value=([], [])),
    ):
        options, ui = JobOptions.from_json(opened.manifest["options"]), Ui(quiet=True)
        job = of_run(opened, options, ui)
        found: list[dict[str, Any]] = verify.check(verify.declare(job), StageContext(opened, ui), run)["checks"]
        return found


def named(checks: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    """Check, subject and metric of what failed."""
    return {(r["check"], r["subject"], r["metric"]) for r in checks if not r["passed"]}


def on_logits(checks: list[dict[str, Any]], check: str) -> list[dict[str, Any]]:
    return [r for r in checks if r["check"] == check and "logit" in r["metric"]]


@pytest.mark.parametrize(
    ("architecture", "layers", "precision"),
    [("llama", "1,2", "int4"), pytest.param("llama", "0,2", "int8", marks=pytest.mark.fuzz),
     pytest.param("mistral-window", "1,2", "int4", marks=pytest.mark.fuzz), ("qwen2", "1,2", "int8"),
     ("gemma3", "0,2", "int4")],
)  # fmt: skip
def test_wiring_is_proven_to_float32_accuracy(
    architecture: str, precision: str, layers: str, runs: CachedHiddenStates, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(runs(architecture, precision, layers), tmp_path / "run"))
    done = nbl("report", run)
    assert done.status == 0, done.err
    found = json.loads((run / "verify.json").read_text(encoding="utf-8"))
    for check in ("original", "nbl"):
        seen = on_logits(found["checks"], check)
        assert {r["tolerance"] for r in seen} == {TOLERANCES["fp32"].limit}
        assert any("chunks of 512" in r["detail"] for r in seen)
        assert max(r["value"] for r in seen) < EXACT
    assert max(r["value"] for r in on_logits(found["checks"], "shipped")) < TOLERANCES[precision].limit
    largest, said = max(r["value"] for r in on_logits(found["checks"], "nbl")), found["proof"]
    assert f"{largest:.1e} of the size of the logits" in said[0] and len(said) == 3
    assert all(sentence in (run / "report.md").read_text(encoding="utf-8") for sentence in said)


def test_a_model_larger_than_memory_is_compared_with_torch_a_block_at_a_time(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.model.mapped.shortage_of", lambda *_: "too large")
    given = ("--model", checkpoint("llama"), "--calibration", text, *TINY, "--layers", 1, "--output", tmp_path / "run")
    with until("verify"), mock.patch.object(load, "load_model", side_effect=AssertionError("the whole model")):
        done = nbl(*given)
    assert done.status == 0, done.err
    found = json.loads((tmp_path / "run" / "verify.json").read_text(encoding="utf-8"))
    compared = [check for check in found["checks"] if check["check"] == "exporter"]
    assert found["passed"] and compared and all(0 < check["value"] < check["tolerance"] for check in compared)


@pytest.mark.parametrize(
    ("scale", "passed", "warns"), [(1.0, True, False), (0.9, True, True), (0.1, False, True), (np.nan, False, False)]
)
def test_the_perplexity_of_a_rounded_original_has_a_bound(
    scale: float, passed: bool, warns: bool, checkpoint: Callable[[str], Path]
) -> None:
    """Logits of a model that is sure, as a graph gives them whose logits were damaged."""
    model = SureOfTheNext(VOCAB)

    class Graph:
        def begin(self, batch: int) -> None:
            pass

        def step(self, ids_BT: np.ndarray) -> np.ndarray:
            return scale * np.stack([exporter.row_logits(model, row) for row in ids_BT])

    windows = np.tile(np.arange(100), (2, 1))
    result, warning = exporter.check_perplexity(model, Graph(), "int4", windows, lambda *_: None)
    assert (result.passed, bool(warning)) == (passed, warns), result


class SureOfTheNext:
    """Gives the next number a logit of 6."""

    device = "cpu"

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def __call__(self, ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=6.0 * torch.nn.functional.one_hot(ids + 1, self.vocab).float())


# -- faults: each changes the graph that ships, and a check of this name must see it --------------------------

Fault = Callable[[ir.Model], None]
WIRING = ("nbl", "nbl", "relative rms logit difference, prefill")
WIRING_OF_STEPS = ("nbl", "nbl", "relative rms logit difference, decode")
UNTOUCHED = ("structure", "nbl", "weights untouched")


def product(model: ir.Model, layer: int) -> ir.Node:
    return next(n for n in model.graph if (n.name or "").startswith(f"/nbl/layers.{layer}/MatMul"))


def exchange_maps(model: ir.Model) -> None:
    one, two = product(model, 1), product(model, 2)
    for k in range(1, len(one.inputs)):
        first, second = one.inputs[k], two.inputs[k]
        one.replace_input_with(k, second)
        two.replace_input_with(k, first)


def transpose_map(model: ir.Model) -> None:
    """The codes of a square matrix, as they are stored of another one: rows and columns exchanged."""
    node = product(model, 1)
    codes = node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    rows = unpacked(codes, np.ones((HIDDEN, codes.size * 2 // HIDDEN // 32)), None, 4, 32, (HIDDEN, HIDDEN)).codes
    turned = rows.T
    packed = (turned[:, ::2] | turned[:, 1::2] << 4).astype(np.uint8).reshape(codes.shape)
    node.inputs[1].const_value = ir.tensor(packed, name=node.inputs[1].name)  # type: ignore[union-attr]


def another_norm(model: ir.Model) -> None:
    """The map of layer 2 acts on what the norm of layer 1 gives."""
    product(model, 2).replace_input_with(0, product(model, 1).inputs[0])


def another_tap(model: ir.Model) -> None:
    """The map of layer 1 acts on the stream instead of its norm."""
    node = product(model, 1)
    norm = node.inputs[0].producer()  # type: ignore[union-attr]
    node.replace_input_with(0, norm.outputs[3] if len(norm.outputs) > 3 else norm.inputs[0])  # type: ignore[union-attr]


def another_cache(model: ir.Model) -> None:
    """The kept layer's key goes out where its value belongs, and the other way round."""
    outputs = {v.name: v for v in model.graph.outputs}
    key, value = outputs["present.0.key"], outputs["present.0.value"]
    key.name, value.name = "present.0.swapped", "present.0.key"
    key.name = "present.0.value"


def lose_residual(model: ir.Model) -> None:
    added = next(n for n in model.graph if (n.name or "").startswith("/nbl/layers.1/Add")).outputs[0]
    join = next(iter(added.consumers()))
    join.replace_input_with(1 - list(join.inputs).index(added), added)


def another_rope_base(model: ir.Model) -> None:
    """Of a table of cosines and sines [positions, half a head] with ten times the base."""
    for name, function in (("cos_cache", np.cos), ("sin_cache", np.sin)):
        value = next(v for v in model.graph.initializers.values() if name in str(v.name))
        positions, half = value.const_value.numpy().shape  # type: ignore[union-attr]
        angles = np.arange(positions)[:, None] * 100_000.0 ** -(np.arange(half) / half)[None]
        value.const_value = ir.tensor(function(angles).astype(np.float32), name=value.name)


def window_off_by_one(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.attributes.get_int("local_window_size", -1) > 0)
    node.attributes["local_window_size"] = ir.AttrInt64(
        "local_window_size", node.attributes["local_window_size"].as_int() + 1
    )


def lose_a_scale(model: ir.Model) -> None:
    """One block of one row, of a matrix that is not a map."""
    name = "model.layers.1.mlp.down_proj.MatMul.weight_scale"
    value = model.graph.initializers[name]
    scales = value.const_value.numpy().copy()  # type: ignore[union-attr]
    scales.reshape(HIDDEN, -1)[40, 1] = 0
    value.const_value = ir.tensor(scales, name=name)


FAULTS: dict[str, tuple[Fault, str, str, tuple[str, str, str]]] = {
    "maps of two layers exchanged": (exchange_maps, "llama", "residual", ("structure", "nbl", MAPS)),
    "a transposed map": (transpose_map, "llama", "residual", ("structure", "nbl", MAPS)),
    "a map on the norm of another layer": (another_norm, "llama", "normed", WIRING),
    "a map on the other tap": (another_tap, "llama", "normed", WIRING),
    "a lost residual": (lose_residual, "qwen2", "residual", WIRING),
    "the cache of another layer": (another_cache, "llama", "residual", WIRING_OF_STEPS),
    "a rope table of another base": (another_rope_base, "llama", "residual", WIRING),
    "a window off by one": (window_off_by_one, "mistral-window", "residual", WIRING),
    "a scale lost in one block row": (lose_a_scale, "llama", "residual", UNTOUCHED),
}  # fmt: skip


OTHER_PRECISION = pytest.param(next(iter(FAULTS)), "int8", marks=pytest.mark.fuzz)


@pytest.mark.parametrize(("fault", "precision"), [*((fault, "int4") for fault in FAULTS), OTHER_PRECISION])
def test_a_planted_fault_is_named(fault: str, precision: str, runs: CachedHiddenStates, tmp_path: Path) -> None:
    plant, architecture, tap, check = FAULTS[fault]
    run = Path(shutil.copytree(runs(architecture, precision, "1,2", tap), tmp_path / "run"))
    path = run / "model" / "model.onnx"
    model = ir.load(path)
    plant(model)
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    shutil.copyfile(tmp_path / "model.onnx", path)
    shutil.copyfile(tmp_path / "model.onnx.data", f"{path}.data")
    checks = continued(run)
    assert check in named(checks)
    assert not any(r["subject"] == "original" and not r["passed"] for r in checks)
