"""An architecture with norms of keys that is in no list gets the default job by its record alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.methods.checkpoint.hf_classes import CLASSES, _classes_of
from nbl_export.model.architecture_record import Architecture
from nbl_export.model.architectures import ARCHITECTURES

from .. import tiny
from ..command import BARE, nbl

pytestmark = [pytest.mark.job, pytest.mark.engine]

NAME = "mellum"
RECORD = Architecture(NAME, "Mellum")
MELLUM = ("Mellum", {"mlp_layer_types": ["dense"] * tiny.LAYERS, "moe_intermediate_size": tiny.INNER})


def test_a_record_alone_gives_predicted_kv(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NAME not in ARCHITECTURES
    monkeypatch.setitem(ARCHITECTURES, NAME, RECORD)
    monkeypatch.setitem(CLASSES, NAME, _classes_of(RECORD))
    monkeypatch.setitem(tiny._SPECIAL, NAME, MELLUM)
    model = tiny.save_checkpoint(NAME, tmp_path / "model")
    asked: tuple[Any, ...] = ("--engine", "openvino", "--recent-tokens", "4", "--max-perplexity-increase", "10000%")
    done = nbl("--model", model, "--calibration", text, *BARE, *asked, "--output", tmp_path / "run")
    assert done.status == 0, done.err
    manifest = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))
    assert manifest["status"] == "verified" and manifest["decoder"]["architecture"] == NAME
    assert set(manifest["kinds"]) == {"predicted_kv"} and manifest["exit"]["recent_tokens"] == 4
