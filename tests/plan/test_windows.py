"""Windows that a user names go through the whole job, beside linear layers and alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.mixers.window import Window
from nbl_export.plan.maps_file import load_maps

from ..command import BARE, nbl
from ..tiny import LAYERS

WORDS = ("--window-layers", "2,", "--window", "5")


@pytest.mark.parametrize(("layers", "kinds"), [(("--layers", "0,"), ["linear", "window"]), ((), ["window"])])
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
    said = (run / "report.md").read_text()
    assert "layer 2 reads the last tokens and the first one alone" in said and "by a linear layer" not in said
    for form, part in (("gguf", "layer 2 is of the kind window"), ("transformers", "holds no layers of kind window")):
        refused = nbl("convert", run, "--to", form, "--output", tmp_path / form)
        assert refused.status == 1 and part in refused.err and "ONNX decoder" in refused.err
        assert not (tmp_path / form).exists()


def test_windows_need_the_model_in_memory(
    checkpoint: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.model.one_layer.shortage_of", lambda _checkpoint: "too large")
    same = ("--model", checkpoint("llama"), "--calibration", text, *BARE, "--compute-dtype", "float32")
    done = nbl(*same, *WORDS, "--output", tmp_path / "run")
    assert done.status == 1 and "--window-layers needs the torch model, which does not fit" in done.err
