"""Windows that a user names go through the whole job, beside linear layers and alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export.mixers.window import Window
from nbl_export.plan.kinds import MAP, best_top, long_rows, losses_alone
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
    refused = nbl("convert", run, "--to", "edge-llm", "--output", tmp_path / "saved")
    assert refused.status == 1 and "a layer with a window" in refused.err and not (tmp_path / "saved").exists()


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


class Planted:
    """A model of 9 layers whose KL is planted: kind -> layer -> KL on each text."""

    def __init__(self, maps: Any, kls: Any, asked: list[Any]) -> None:
        self.maps, self.kls, self.asked = maps, kls, asked
        self.original = torch.ones(1, 8, 2)

    def runs(self, ids: Any, *, again: bool) -> Any:
        assert again and not self.maps  # the original runs once for all kinds
        self.asked.append((*ids.shape, int(ids[0, -1])))
        return PlantedRuns(int(ids[0, -1]), self)

    def losses(self, ids: Any, original: Any, last: Any, every: int) -> Any:
        assert tuple(last) == tuple(self.maps)  # the original's logits are computed once for the layers of a part
        assert (every, *ids.shape, *original.shape) == (8, 8, 8, 2)
        return {name: SimpleNamespace(kl=(value - original).mean().item()) for name, value in last.items()}


class PlantedRuns:
    def __init__(self, text: int, model: Planted) -> None:
        self.text, self.model, self.original = text, model, model.original

    def of(self, model: Planted) -> PlantedRuns:
        return PlantedRuns(self.text, model)

    def last(self, sets: Any) -> Any:
        for (layer,) in sets:
            kind = self.model.maps[layer]
            yield self.original + self.model.kls[kind][layer][self.text]


def test_layers_are_measured_from_the_top_until_it_is_enough() -> None:
    """On a long row of each text and one that repeats a passage, with each kind; an eighth of the layers at once."""
    kls = {MAP: dict.fromkeys(range(17), (4.0, 2.0, 7.0)), 5: dict.fromkeys(range(17), (1.0, 3.0, 5.0))}
    first = torch.tensor([[2, 2, 2, 2], [0, 0, 0, 0]])  # the row of this text ends with 0, and repeated it ends with 2
    texts = [("one", first), ("two", torch.ones(2, 4, dtype=torch.long))]
    asked: list[Any] = []
    done: list[tuple[int, int]] = []

    def found(enough: int) -> Any:
        asked.clear()
        mixers: Any = lambda layers: {kind: dict.fromkeys(layers, kind) for kind in kls}  # noqa: E731
        made: Any = lambda maps: Planted(maps, kls, asked)  # noqa: E731
        is_enough: Any = lambda losses: len(losses) >= enough  # noqa: E731
        return losses_alone(made, mixers, 17, texts, 8, is_enough, lambda *state: done.append(state))

    assert found(1) == {i: {MAP: (4.0, 2.0, 7.0), 5: (1.0, 3.0, 5.0)} for i in (15, 16)}
    assert asked == [(1, 8, text) for text in (0, 1, 2)] and done[-1] == (4, 34)
    assert sorted(found(3)) == [13, 14, 15, 16]
    assert sorted(found(100)) == list(range(1, 17))  # one layer keeps its attention


def saved(kinds: Any) -> float:
    """As a pruned tail saves: 0.2 for each layer, less for the windows above it, and nothing from 500 rows on."""
    total, rows = 0.0, 0
    for i in sorted(kinds, reverse=True):
        rows += kinds[i]
        total += 0.2 * max(0.0, 1 - rows / 500)
    return total


LOSSES: Any = {
    8: {MAP: (0.05, 0.02), 64: (0.02, 0.02)},
    7: {MAP: (0.02, 0.05), 64: (0.06, 0.06)},
    6: {MAP: (0.30, 0.30), 64: (0.03, 0.03)},
    5: {MAP: (0.02, 0.02), 64: (0.02, 0.02)},
    4: {MAP: (0.40, 0.40), 64: (0.30, 0.30)},
}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.01, {}),
        (0.03, {8: 64}),
        (0.08, {8: MAP, 7: MAP}),  # a window would cost rows in both, and spares less
        (0.13, {8: MAP, 7: MAP, 6: 64, 5: MAP}),  # without the window in layer 6 the limit is not kept
        (9.0, {8: MAP, 7: MAP, 6: 64, 5: MAP}),  # layer 4 loses more than it saves
    ],
)
def test_the_top_saves_most_more_than_it_loses(limit: float, expected: dict[int, int]) -> None:
    """The loss is the sum of layers on the worst text."""
    assert best_top(LOSSES, limit, saved) == expected


def test_the_wider_windows_are_taken_if_they_are_worth_more() -> None:
    losses: Any = {8: {MAP: (1.0,), 64: (0.1,), 128: (0.01,)}, 7: {MAP: (1.0,), 64: (0.05,), 128: (0.01,)}}
    assert best_top(losses, 9.0, saved) == {8: 128, 7: 128}
    losses[8][128] = losses[7][128] = (0.1,)
    assert best_top(losses, 9.0, saved) == {8: 64, 7: 64}


@pytest.mark.parametrize("short", [False, True])
def test_the_job_begins_with_the_top(
    short: bool, checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if memory holds only one layer at a time."""
    run = tmp_path / "run"
    monkeypatch.setattr("nbl_export.plan.kinds.best_top", lambda losses, _limit, _saved: {2: 5, 1: MAP})
    if short:
        monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda *_: "too large")
        monkeypatch.setattr(
            "nbl_export.model.checkpoint.load.load_model", lambda _d: pytest.fail("the whole model was loaded")
        )
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    with until("plan"):
        done = nbl(*same, "--layers", 2, "--window-layers", "auto", "--window", 5, "--output", run)
    assert done.status == 0, done.err
    facts = json.loads((run / "nbl.json").read_text())
    assert facts["greedy"]["top"] == {"layers": [2, 1], "windows": {"2": 5}}
    assert [step["layers"] for step in facts["greedy"]["steps"]] == [[2], [2, 1]]
    assert dict(zip(facts["replaced_layers"], facts["kinds"], strict=True)) == {1: "linear", 2: "window"}
    assert "the top from layer 1 on is replaced first; layers 2 read 5 tokens and the first one alone" in done.err
    with until("plan"):
        again = nbl("plan", run, "--layers", 1)
    assert again.status == 0 and "is replaced first" not in again.err  # the top is recorded
    facts = json.loads((run / "nbl.json").read_text())
    assert (facts["replaced_layers"], facts["kinds"]) == ([2], ["window"])


def test_a_model_that_has_no_windows_gets_none_by_itself(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    same = ("--calibration", text, *BARE, "--compute-dtype", "float32", "--max-perplexity-increase", "100000%")
    with until("plan"):
        done = nbl("--model", checkpoint("qwen3"), *same, "--fit", "independent", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    assert "no layer gets a window: layer 2" in done.err and "norms queries and keys" in done.err
    facts = json.loads((tmp_path / "run" / "nbl.json").read_text())
    assert set(facts["kinds"]) == {"linear"} and facts["options"]["window_layers"] == "auto"
