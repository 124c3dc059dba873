"""Windows that a user names go through the whole job, beside linear layers and alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.mixers.window import Window
from nbl_export.plan.kinds import better_as_windows, long_rows
from nbl_export.plan.maps_file import load_maps
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


def test_layers_that_lose_clearly_less_get_a_window() -> None:
    """On both texts together, one long row of each."""
    losses = {"map 4": (4.0, 2.1), "window 4": (3.0, 1.0), "map 5": (4.0, 1.9), "window 5": (1.0, 3.0)}
    asked: list[tuple[int, ...]] = []

    class Planted:
        original = torch.ones(1, 8, 2)

        def __init__(self, maps: Any) -> None:
            self.maps = maps

        def runs(self, ids: Any, *, again: bool) -> Any:
            assert not again
            asked.append((*ids.shape, int(ids[0, 0])))
            self.text = int(ids[0, 0])
            return self

        def last(self, sets: Any) -> Any:
            assert list(sets) == [(4,), (5,)]
            for (layer,) in sets:
                yield self.original + losses[self.maps[layer]][self.text]

        def losses(self, ids: Any, original: Any, last: Any, every: int) -> Any:
            assert (every, *ids.shape, *original.shape) == (8, 8, 8, 2)
            return {name: SimpleNamespace(kl=(value - original).mean().item()) for name, value in last.items()}

    made: Any = Planted
    fitted, windows = ({i: f"{kind} {i}" for i in layers} for kind, layers in (("map", range(9)), ("window", (4, 5))))
    texts, done = [("one", torch.zeros(4, 4)), ("two", torch.ones(4, 4))], []

    def found() -> Any:
        maps: tuple[Any, Any] = fitted, windows
        return better_as_windows(made, *maps, texts, 8, lambda *state: done.append(state))

    assert found() == (4,)
    assert asked == [(1, 8, 0), (1, 8, 1)] * 2 and done[-1] == (8, 8)
    losses["map 5"] = (4.0, 2.1)
    assert found() == (4, 5)


@pytest.mark.parametrize("short", [False, True])
def test_the_job_chooses_a_kind_for_each_upper_layer(
    short: bool, checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if memory holds only one layer at a time. All windows of the upper layers are taken."""
    run = tmp_path / "run"
    monkeypatch.setattr("nbl_export.plan.kinds._TIMES", 0.0)
    if short:
        monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda *_: "too large")
        monkeypatch.setattr(
            "nbl_export.model.checkpoint.load.load_model", lambda _d: pytest.fail("the whole model was loaded")
        )
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    with until("plan"):
        done = nbl(*same, *LIMIT, "--window-layers", "auto", "--window", 5, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    windows = facts["greedy"]["windows"]
    assert windows == [2]
    kinds = dict(zip(facts["replaced_layers"], facts["kinds"], strict=True))
    assert kinds == {i: "window" if i in windows else "linear" for i in kinds}
    assert "layers 2 may read 5 tokens and the first one alone, in place of a linear layer" in done.err
    with until("plan"):
        again = nbl("plan", run, "--max-perplexity-increase", "90000%")
    assert again.status == 0 and "may read" not in again.err  # they are recorded
    assert json.loads((run / "nbl.json").read_text())["greedy"] == facts["greedy"]


def test_a_model_that_has_no_windows_gets_none_by_itself(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    same = ("--calibration", text, *BARE, "--compute-dtype", "float32", "--max-perplexity-increase", "100000%")
    with until("plan"):
        done = nbl("--model", checkpoint("qwen3"), *same, "--fit", "independent", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert "no layer gets a window: layer 2" in done.err and "norms queries and keys" in done.err
    facts = json.loads((tmp_path / "run" / "nbl.json").read_text())
    assert set(facts["kinds"]) == {"linear"} and facts["options"]["window_layers"] == "auto"
