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
