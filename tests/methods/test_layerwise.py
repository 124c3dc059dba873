"""One layer at a time: the same moments, out of one file or several, and never the whole model."""

from __future__ import annotations

import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nbl_export.files import file_sha256
from nbl_export.methods import collector
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear import collect
from nbl_export.model import mapped
from tests.command import keys, nbl
from tests.tiny import LAYERS

pytestmark = pytest.mark.job

Checkpoint = Callable[[str], Path]


@pytest.fixture
def sharded(checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str, torch.dtype], Path]:
    """(architecture, dtype) -> the tiny checkpoint in many files with an index."""

    def make(architecture: str, dtype: torch.dtype) -> Path:
        out = Path(shutil.copytree(checkpoint(architecture), tmp_path / f"sharded-{architecture}"))
        (out / "model.safetensors").unlink()
        load_model(checkpoint(architecture)).to(dtype).save_pretrained(out, max_shard_size="40KB")
        assert len(list(out.glob("*.safetensors"))) > 3
        return out

    return make


@pytest.fixture
def given(text: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    for module in (collector, collect):
        monkeypatch.setattr(module, "BATCH_TOKENS", 128)
    return ("--calibration", text, "--calibration-tokens", 1100, *keys(context=64, tap="normed"))


def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbl_export.model.mapped.shortage_of", lambda *_: "too large")


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", torch.float32),
        ("mistral-window", torch.bfloat16),
        pytest.param("mistral", torch.bfloat16, marks=pytest.mark.fuzz),
    ],
)
def test_moments_are_those_of_the_whole_model(
    architecture: str, dtype: torch.dtype, given: Any, sharded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("calibrate", "--model", sharded(architecture, dtype), *given)
    assert nbl(*given, "--output", tmp_path / "whole").status == 0
    monkeypatch.setattr(
        "nbl_export.methods.checkpoint.load.load_model", lambda _d: pytest.fail("the whole model was loaded")
    )
    short_of_memory(monkeypatch)
    done = nbl(*given, "--output", tmp_path / "layers")
    assert done.status == 0, done.err
    hashes = [file_sha256(tmp_path / name / "sums.safetensors") for name in ("whole", "layers")]
    assert hashes[0] == hashes[1]
    assert not list((tmp_path / "layers").glob(".nbl-export-*"))


def test_chosen_by_itself_where_memory_is_short(
    given: Any, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = mapped.float32_bytes(checkpoint("llama"))
    assert needed == sum(4 * p.numel() for p in load_model(checkpoint("llama")).parameters())
    given = ("calibrate", "--model", checkpoint("llama"), *given)
    monkeypatch.setattr("nbl_export.run.estimate.available_bytes", lambda: 1 << 40)  # which would refuse the job
    for share, expected in ((0.59, False), (0.61, True)):
        memory = types.SimpleNamespace(available=int(needed / share))
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        done = nbl(*given, "--force", "--output", tmp_path / "run")
        assert done.status == 0, done.err
        assert ("one layer at a time: the weights are" in done.err) is expected


def test_layers_are_chosen_as_with_the_whole_model(
    given: Any, sharded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on quality is tested and an order found; what differs is rounding. Nothing is trained."""
    made = nbl("calibrate", "--model", sharded("llama", torch.bfloat16), *given, "--output", tmp_path / "whole")
    assert made.status == 0, made.err
    shutil.copytree(tmp_path / "whole", tmp_path / "layers")
    limit = ("--exit-layer", "none", "--max-perplexity-increase", "100000%")
    facts = []
    for name, fit in (("whole", "independent"), ("layers", "distilled")):
        if name == "layers":
            short_of_memory(monkeypatch)
            monkeypatch.setattr(
                "nbl_export.methods.checkpoint.load.load_model", lambda _d: pytest.fail("the whole model was loaded")
            )
        run = tmp_path / name
        planned = nbl("plan", run, *limit, "--fit", fit)
        assert planned.status == 0, planned.err
        assert ("one layer at a time: the weights are too large" in planned.err) is (name == "layers")
        facts.append(json.loads((run / "nbl.json").read_text()))
        assert not list(run.glob(".nbl-export-*"))
    whole, layers = facts
    assert whole["select"] == layers["select"] == "efficient"
    assert len(layers["goal"]["path"]) == LAYERS - 1
    for part in ("replaced_layers", "goal", "curve"):
        assert_near(layers[part], whole[part])


def assert_near(found: Any, expected: Any) -> None:
    """Equal JSON values, but for the rounding of numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_near(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other)
    else:
        assert found == (pytest.approx(expected, rel=2e-3, abs=1e-5) if isinstance(expected, float) else expected)


def test_sums_and_weights_of_one_layer_are_in_memory_at_a_time(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, held = mapped.mapped_model(checkpoint("llama")), list[tuple[int, ...]]()
    with collect.Collection(model, ("residual",)) as found:

        def write(_self: Any, _sums: Any) -> None:
            sums = [i for i, each in found.found["residual"].items() if each._xx.numel()]
            held.append((*sums, sum(p.device.type != "meta" for p in model.parameters())))

        monkeypatch.setattr(collect.SumsWriter, "write", write)
        monkeypatch.setattr(collect.SumsWriter, "__exit__", lambda *_: None)
        facts = {"identity": {"batches": 1}, "done": 1}
        found.by_layer(torch.arange(2, 66).view(2, 32), tmp_path / "sums", facts, tmp_path, lambda _d, _t: None)
    assert held == [(i, 0) for i in range(LAYERS)]
