"""A job on a hybrid, from its checkpoint to a report, and the forms that its model is saved in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.graph.decoder import OnnxDecoder

from ..command import TINY, assert_refused, nbl
from ..tiny import HEAD_DIM, HYBRID_ATTENTION, KV_HEADS


def test_a_job_on_a_hybrid(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, run = checkpoint("lfm2_moe"), tmp_path / "run"
    done = nbl("--model", model, "--output", run, "--calibration", text, *TINY, "--layers", "2", "--precision", "int4")
    assert done.status == 0, done.err
    facts, report = (json.loads((run / name).read_text()) for name in ("nbl.json", "report.json"))
    assert facts["status"] == "verified" and [s["layer"] for s in facts["scores"]] == list(HYBRID_ATTENTION)
    replaced = facts["replaced_layers"]
    assert len(replaced) == 2 and set(replaced) < set(HYBRID_ATTENTION)
    token = 2 * KV_HEADS * HEAD_DIM * 4
    assert report["cache_bytes_per_token"] == {"original": 3 * token, "nbl": token}
    assert "2 of 3 attention layers are replaced" in (run / "report.md").read_text()
    assert set(report["variants"]) == {"original", "nbl"}
    decoder = OnnxDecoder(run / "model", HEAD_DIM)
    assert decoder.contract.state_layers == (0, 3) and len(decoder.contract.cache_layers) == 1
    said = nbl("generate", run, "Once", "--max-new-tokens", "4")
    assert said.status == 0, said.err
    saved = nbl("convert", run, "--to", "transformers", "--output", tmp_path / "saved")
    assert saved.status == 0, saved.err
    for form in ("gguf", "nemotron-nas", "edge-llm"):
        refused = nbl("convert", run, "--to", form, "--output", tmp_path / form)
        assert refused.status == 1 and "Traceback" not in refused.err, refused.err
        assert not (tmp_path / form).exists()
    assert nbl("card", run).status == 0
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "2 of 3 attention layers replaced" in card and "2 of them without attention; the tool is tested on" in card
    program = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1]  # of ONNX Runtime alone, which holds the states
    monkeypatch.chdir(run / "model")
    exec(program, {"__name__": "__main__"})


def test_what_a_hybrid_does_not_go_with_is_refused_before_any_work(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    job = ("--model", checkpoint("lfm2"), "--output", tmp_path / "run", "--calibration", text, *TINY)
    assert_refused(nbl(*job, "--layers", "0,"), 1, "layer 0 has no")
    assert not (tmp_path / "run").exists()
