"""The first day on a GPU, with a stand-in of nbl-export that says what the real one says."""

from __future__ import annotations

import importlib.util
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nbl_export.cli.app import app
from nbl_export.errors import NblError
from nbl_export.options.option import ModelFacts
from nbl_export.options.settle import settle
from nbl_export.records.decoder import DecoderSpec
from nbl_export.run.settled import capabilities_of

SCRIPT = Path(__file__).parents[2] / "bench" / "first_day.py"
# Notes its words, makes what each command makes, and fails as FAILS says. POSITIONS is the real refusal of the slots.
STAND_IN = """
import os, pathlib, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    print(*words, file=calls)
if words[0] in os.environ.get("FAILS", "").split():
    sys.exit("error: it went wrong")
if words[0] == "--model":
    if int(words[words.index("--max-seq-len") + 1]) > 8192:
        sys.exit(os.environ["POSITIONS"])
    run = pathlib.Path(words[-1])
    for name in ("nbl.json", "model/decoder.onnx.data", "engine/model/decoder.engine", "engine/model/engine.json"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
if words[0] == "accept":
    (pathlib.Path(words[1]) / "acceptance.json").write_text("{}")
print("done:", *words)
"""


@pytest.fixture
def day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("first_day", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.setattr(module, "COMMAND", (sys.executable, str(tmp_path / "stand_in.py")))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    decoder = DecoderSpec("llama", 30, 576, 9, 3, 64, 49152, 8192)
    with pytest.raises(NblError, match="positions") as refusal:
        settle({"model": "m", "engine": "trt", "max_seq_len": 24_064}, capabilities_of, ModelFacts(decoder=decoder))
    monkeypatch.setenv("POSITIONS", f"error: {refusal.value}")
    return module


def calls(tmp_path: Path) -> list[str]:
    """What nbl-export was told; today's program has each command and option."""
    lines = [line.replace(str(tmp_path), "") for line in (tmp_path / "calls.txt").read_text().splitlines()]
    for first, *words in map(str.split, lines):
        command = app if first.startswith("--") else app.commands[first]
        known = {name for parameter in command.params for name in parameter.opts}
        assert known >= {word for word in (first, *words) if word.startswith("--")}
    return lines


def test_every_command_runs_and_the_results_are_packed(day: Any, tmp_path: Path) -> None:
    """A model of 8,192 positions is exported with so many slots; no weights and no engines are in the archive."""
    assert day.main(["m", str(tmp_path / "out"), "--", "--layers", "2"]) == 0
    job = "--model m --engine trt --layers 2 --max-seq-len {} --output /out/{}"
    measured = ["build /out/{} --engine trt", "accept /out/{}", "bench /out/{}",
                "generate /out/{} The capital of France is --max-new-tokens 32", "report /out/{}"]  # fmt: skip
    assert calls(tmp_path) == [
        "doctor", job.format(2048, 2048), *(step.format(2048) for step in measured), job.format(24_064, 24_064),
        job.format(8192, 8192), *(step.format(8192) for step in measured),
        "bench /out/2048 /out/8192",
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "first-day.tar.gz") as tar:
        names = {name for name in tar.getnames() if not name.startswith("logs/")}
        logs = [name for name in tar.getnames() if name.startswith("logs/")]
    kept = ("nbl.json", "acceptance.json", "engine/model/engine.json")
    assert names == {"first-day.json", *(f"{run}/{name}" for run in (2048, 8192) for name in kept)}
    steps = json.loads((tmp_path / "out" / "first-day.json").read_text(encoding="utf-8"))
    assert len(steps) == len(logs) == len(calls(tmp_path)) + 1  # and nvidia-smi
    assert "done: doctor" in (tmp_path / "out" / "logs" / steps[1]["log"]).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("fails", "left_out"),
    [("accept", []), ("build", ["accept", "bench", "generate", "report"]), ("--model", ["build", "accept", "bench"])],
)
def test_a_failure_is_recorded_and_the_rest_runs(
    fails: str, left_out: list[str], day: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", fails)
    assert day.main(["m", str(tmp_path / "out"), "--slots", "2048"]) == 1
    ran = [line.split()[0] for line in calls(tmp_path)]
    everything = ["build", "accept", "bench", "generate", "report"]
    assert [word for word in everything if word not in ran] == (everything if fails == "--model" else left_out)
    assert (tmp_path / "out" / "first-day.tar.gz").is_file()
    (failed,) = [s for s in json.loads((tmp_path / "out" / "first-day.json").read_text()) if s["status"] == 1]
    assert failed["command"][2] == fails


def test_a_run_of_another_machine_is_built_here(day: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "2048").mkdir(parents=True)
    (tmp_path / "out" / "2048" / "nbl.json").write_text("{}")
    assert day.main(["m", str(tmp_path / "out"), "--slots", "2048"]) == 0
    assert [line.split()[0] for line in calls(tmp_path)] == ["doctor", "build", "accept", "bench", "generate", "report"]
