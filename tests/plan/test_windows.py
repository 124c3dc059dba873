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
    assert facts["fit"]["kind"] == ("distilled" if "--distill-steps" in layers else "independent")
    if layers == LIMIT:
        (step,) = facts["goal"]["path"]  # of both layers together
        assert step["layers"] == 2 and facts["goal"]["given"] == [LAYERS - 1]
    said = (run / "report.md").read_text()
    assert "layer 2 reads the last tokens and the first one alone" in said and "by a linear layer" not in said
    refused = nbl("convert", run, "--to", "gguf", "--output", tmp_path / "gguf")
    assert refused.status == 1 and "layer 2 is of the kind window" in refused.err and not (tmp_path / "gguf").exists()


def test_a_saved_run_with_windows_is_the_model_of_a_job(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """The same maps, verified again; an engine without windows refuses it before it starts."""
    first, saved, again = tmp_path / "first", tmp_path / "saved", tmp_path / "again"
    same = ("--calibration", text, *BARE, "--compute-dtype", "float32")
    with until("verify"):
        assert nbl("--model", checkpoint("llama"), *same, "--layers", "0,", *WORDS, "--output", first).status == 0
    done = nbl("convert", first, "--to", "transformers", "--output", saved)
    assert done.status == 0, done.err
    done = nbl("--model", saved, "--calibration", text, *BARE, "--output", again)
    assert done.status == 0, done.err
    facts = json.loads((again / "nbl.json").read_text())
    assert (facts["status"], facts["kinds"], facts["fit"]) == ("verified", ["linear", "window"], {"kind": "given"})
    maps = [load_maps(run / "maps.safetensors", (0, LAYERS - 1))[LAYERS - 1].tensors() for run in (first, again)]
    assert all((maps[1][part] == array).all() for part, array in maps[0].items())
    refused = nbl("--model", saved, "--engine", "trt-rtx", "--output", tmp_path / "engine")
    assert refused.status == 2 and "has layers of kind window, which need --engine openvino, or ort" in refused.err
    assert not (tmp_path / "engine").exists()


def test_rows_are_consecutive_windows() -> None:
    windows = torch.arange(24).view(6, 4)
    assert long_rows(windows, 8).tolist() == torch.arange(24).view(3, 8).tolist()
    assert long_rows(windows, 10).tolist() == torch.arange(20).view(2, 10).tolist()
    assert long_rows(windows, 25) is windows


def test_as_many_top_layers_as_the_share_allows_are_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the worse text; and at most half of the layers."""
    rises = {"one": (0.01, 0.02, 0.03, 0.06), "two": (0.01, 0.02, 0.05, 0.02)}
    asked: list[tuple[int, ...]] = []

    class Switched:
        def __init__(self, _model: Any, maps: dict[int, str], tap: str, *, narrow: bool) -> None:
            assert (tuple(maps), tap, narrow) == ((4, 5, 6, 7), "normed", True)

        def quality_losses(self, rows: Any, sets: dict[int, Any], _progress: Any) -> dict[int, Any]:
            name = "one" if rows[0, 0] == 1 else "two"
            asked.append(tuple(rows.shape))
            assert {k: tuple(layers) for k, layers in sets.items()} == {k: tuple(range(8 - k, 8)) for k in (1, 2, 4)}
            return {k: SimpleNamespace(perplexities=(4.0, 4.0 * (1 + rises[name][k - 1]))) for k in sets}

    monkeypatch.setattr(top, "SwitchedModel", Switched)
    monkeypatch.setattr(top, "window_layers", lambda _model, layers, tokens, _tap: dict.fromkeys(layers, f"w{tokens}"))
    decoder = SimpleNamespace(layers=[None] * 8)
    model = SimpleNamespace(get_decoder=lambda: decoder, config=SimpleNamespace(max_position_embeddings=64))
    texts = [("one", torch.ones(4, 32)), ("two", torch.zeros(4, 32))]

    def found(share: float) -> Any:
        return top.top_windows(model, 5, "normed", texts, share, narrow=True)

    assert found(0.04) == {6: "w5", 7: "w5"}
    assert found(0.015) == {7: "w5"}
    assert found(0.065) == dict.fromkeys((4, 5, 6, 7), "w5") and found(0.001) == {}
    assert set(asked) == {(2, 64)}


def test_the_job_chooses_windows_at_the_top(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    with until("plan"):
        done = nbl(*same, *LIMIT, "--window-layers", "auto", "--window", 5, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert facts["given"] == [LAYERS - 1] and facts["kinds"] == ["linear", "window"]
    assert f"layers {LAYERS - 1} read 5 tokens and the first one alone; such layers may cost 50000%" in done.err


def test_windows_need_the_model_in_memory(
    checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda _checkpoint: "too large")
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    done = nbl(*same, *WORDS, "--output", tmp_path / "run")
    assert done.status == 1 and "--window-layers needs the torch model, which does not fit" in done.err
