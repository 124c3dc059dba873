"""Under torchrun: calibration gives the bytes of one process, distillation its maps but for rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export.calibrate import collect
from nbl_export.calibrate.moments_file import whole_moments
from nbl_export.files import file_sha256
from nbl_export.parallel.ranks import Ranks
from nbl_export.run import pipeline

from ..command import TINY, nbl

# torchrun with small batches, and a partial file after each round
SCRIPT = """
import nbl_export.calibrate.collect, nbl_export.model.bfloat16, nbl_export.run.stages.calibrate
nbl_export.calibrate.collect._BATCH_TOKENS = 128
nbl_export.model.bfloat16.fast = lambda _device: False  # halves of a batch round otherwise in bfloat16
nbl_export.run.stages.calibrate._SECONDS = nbl_export.run.stages.calibrate._SHARE = 0
from nbl_export.cli.app import main
if __name__ == "__main__":
    main()
"""


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[2], env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def test_two_processes_collect_what_one_does(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_BATCH_TOKENS", 128)
    (tmp_path / "small.py").write_text(SCRIPT)
    given = ("calibrate", "--model", checkpoint("llama"), "--calibration", text, "--calibration-tokens", 1100,
             "--context", 64, "--tap", "normed", "--compute-dtype", "float32")  # fmt: skip
    assert nbl(*given, "--output", tmp_path / "one").status == 0
    done = torchrun(tmp_path / "small.py", *given, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "moments.safetensors")]  # said once
    with whole_moments(tmp_path / "one" / "moments.safetensors") as file:
        assert (file.facts["count"], file.taps) == (1152, ("residual", "normed"))
    one, two = (file_sha256(tmp_path / name / "moments.safetensors") for name in ("one", "two"))
    assert one == two
    assert {p.name for p in (tmp_path / "two").iterdir()} == {".lock", "moments.safetensors", "nbl.json"}


class Recorded(Ranks):
    """A process of two, and what it shares; the first one has no orders."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 1)
        self.shared: list[Any] = []

    def share(self, value: Any) -> Any:
        self.shared.append(value)


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_is_said_by_the_first_process_which_releases_the_others(
    rank: int, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Recorded(rank)
    monkeypatch.setattr(pipeline, "current", lambda: here)
    given = ("calibrate", "--model", checkpoint("llama"), "--calibration", tmp_path / "missing.txt")
    done = nbl(*given, "--output", tmp_path / "run")
    said = (1, 1) if rank == 0 else (0, 0)
    assert (done.status, done.err.count("no calibration text at")) == said and len(done.err.splitlines()) == said[1]
    assert here.shared == [None]  # no more work


@pytest.mark.fuzz
def test_bad_input_ends_all_processes_with_one_line(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SCRIPT)
    given = ("calibrate", "--model", checkpoint("llama"), "--calibration", tmp_path / "missing.txt")
    done = torchrun(tmp_path / "small.py", *given, "--output", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("no calibration text at") == 1


@pytest.mark.fuzz
def test_two_processes_distil_what_one_does(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has half of the rows of a step and half of the held-back windows."""
    monkeypatch.setattr("nbl_export.model.bfloat16.fast", lambda _device: False)
    (tmp_path / "small.py").write_text(SCRIPT)
    given = ("--model", checkpoint("llama"), "--calibration", text, *TINY, "--layers", "1,2", "--fit", "distilled",
             "--distill-steps", "6")  # fmt: skip
    one = nbl(*given, "--output", tmp_path / "one")
    assert one.status == 0, one.err
    done = torchrun(tmp_path / "small.py", *given, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "report.html")]  # said once
    kl = [json.loads((tmp_path / name / "distill.json").read_text())["held_kl"] for name in ("one", "two")]
    assert kl[1] == [[step, pytest.approx(value, rel=1e-4)] for step, value in kl[0]]
    assert kl[0][-1][1] < kl[0][0][1]
    ours, theirs, start = (load_file(tmp_path / name) for name in (
        "two/maps.safetensors", "one/maps.safetensors", "one/start.safetensors"))  # fmt: skip
    for name, value in theirs.items():
        moved = np.abs(value - start[name]).max()
        assert moved > 0
        assert np.abs(ours[name] - value).max() < 0.02 * moved, name
