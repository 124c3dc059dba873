"""Windows that a user names go through the whole job, beside linear layers and alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.mixers.window import Window
from nbl_export.plan import top_windows as top
from nbl_export.plan.maps_file import load_maps
from nbl_export.plan.top_windows import long_rows
from nbl_export.run_directory import START_FILE

from ..command import BARE, nbl
from ..jobs import until
from ..tiny import LAYERS

WORDS = ("--window-layers", "2,", "--window", "5")


LIMIT = ("--max-perplexity-increase", "100000%", "--distill-steps", 4)


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        (("--layers", "0,"), ["linear", "window"]),
        (("--layers", 0), ["window"]),
        (("--layers", "0,", "--fit", "distilled", "--distill-steps", 4), ["linear", "window"]),
        (LIMIT, ["linear", "window"]),
    ],
    ids=["named", "alone", "trained", "limit"],
)
def test_named_windows_ship_verified(
    layers: tuple[str, ...], kinds: list[str], checkpoint: Any, text: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    done = nbl(*same, *layers, *WORDS, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert (facts["status"], facts["kinds"]) == ("verified", kinds)
    replaced = tuple(facts["replaced_layers"])
    window = load_maps(run / "maps.safetensors", replaced)[LAYERS - 1]
    assert isinstance(window, Window) and window.shape.tokens == 5
    assert "no layer of kind window" not in done.err
    trained = "--distill-steps" in layers
    assert facts["fit"]["kind"] == ("distilled" if trained else "independent")
    if trained:
        assert facts["fit"]["best_step"]
        start = load_maps(run / START_FILE, replaced)[LAYERS - 1]
        assert isinstance(start, Window) and (start.qkv != window.qkv).any() and (start.output != window.output).any()
    if layers == LIMIT:
        (step,) = facts["goal"]["path"]  # of both layers together
        assert step["layers"] == 2 and facts["goal"]["given"] == [LAYERS - 1]
    said = (run / "report.md").read_text()
    assert "layer 2 reads the last tokens and the first one alone" in said and "by a linear layer" not in said
    for form, part in (("gguf", "layer 2 is of the kind window"), ("transformers", "holds no layers of kind window")):
        refused = nbl("convert", run, "--to", form, "--output", tmp_path / form)
        assert refused.status == 1 and part in refused.err and "ONNX decoder" in refused.err
        assert not (tmp_path / form).exists()


def test_rows_are_consecutive_windows() -> None:
    windows = torch.arange(24).view(6, 4)
    assert long_rows(windows, 8).tolist() == torch.arange(24).view(3, 8).tolist()
    assert long_rows(windows, 10).tolist() == torch.arange(20).view(2, 10).tolist()
    assert long_rows(windows, 25) is windows


def test_as_many_top_layers_as_the_share_allows_are_windows() -> None:
    """On the worse text; and at most half of the layers. No set is tried above one that costs too much."""
    rises = {"one": (0.01, 0.02, 0.03, 0.06, 0.06), "two": (0.01, 0.02, 0.05, 0.02, 0.07)}
    asked: list[tuple[int, ...]] = []
    tried: list[int] = []

    class Switched:
        def __init__(self, maps: Any) -> None:
            assert maps == dict.fromkeys((5, 6, 7, 8, 9), "window")

        def quality_losses(self, rows: Any, sets: dict[int, Any], _progress: Any) -> dict[int, Any]:
            name = "one" if rows[0, 0] == 1 else "two"
            asked.append(tuple(rows.shape))
            assert all(tuple(layers) == tuple(range(10 - k, 10)) for k, layers in sets.items())
            tried.extend(sets)
            return {k: SimpleNamespace(perplexities=(4.0, 4.0 * (1 + rises[name][k - 1]))) for k in sets}

    spec: Any = SimpleNamespace(num_layers=10, max_positions=64)
    texts = [("one", torch.ones(4, 32)), ("two", torch.zeros(4, 32))]

    def found(share: float) -> Any:
        windows: Any = lambda layers: dict.fromkeys(layers, "window")  # noqa: E731
        mixes: Any = Switched
        return top.top_windows(spec, windows, mixes, texts, share)

    assert list(found(0.04)) == [8, 9]
    assert found(0.015) == {9: "window"} and found(0.001) == {}
    assert max(tried) == 4
    assert list(found(0.065)) == [6, 7, 8, 9]
    assert list(found(0.08)) == [5, 6, 7, 8, 9]
    assert set(asked) == {(2, 64)}


@pytest.mark.parametrize("short", [False, True])
def test_the_job_chooses_windows_at_the_top(
    short: bool, checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if memory holds only one layer at a time."""
    run = tmp_path / "run"
    if short:
        monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda _checkpoint: "too large")
        monkeypatch.setattr(
            "nbl_export.model.checkpoint.load.load_model", lambda _d: pytest.fail("the whole model was loaded")
        )
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    with until("plan"):
        done = nbl(*same, *LIMIT, "--window-layers", "auto", "--window", 5, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert facts["replaced_layers"][-1] == LAYERS - 1 and facts["kinds"] == ["linear", "window"]
    assert f"layers {LAYERS - 1} read 5 tokens and the first one alone; such layers may cost 50000%" in done.err


def test_a_model_that_has_no_windows_gets_none_by_itself(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    same = ("--calibration", text, *BARE, "--compute-dtype", "float32", "--max-perplexity-increase", "100000%")
    with until("plan"):
        done = nbl("--model", checkpoint("qwen3"), *same, "--fit", "independent", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert "no layer gets a window: layer 2" in done.err and "norms queries and keys" in done.err
    facts = json.loads((tmp_path / "run" / "nbl.json").read_text())
    assert set(facts["kinds"]) == {"linear"} and facts["options"]["window_layers"] == "auto"
