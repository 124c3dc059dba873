"""The table of runtimes: what is here says what the run's own runner says; what is not here, or errs, is told apart."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[1] / "bench" / "runtimes"
sys.path.insert(0, str(HERE))  # as for a script
import rows as catalogue  # noqa: E402
import run as runtimes  # noqa: E402
from rows import Missing, Place, Row  # noqa: E402

PYTHON = tuple(row for row in catalogue.ROWS if "Python" in row.name)  # what every developer has
REFERENCE = runtimes.Reference("a", False, (5, 6), (7, 8, 1), "b", (1,), 4)


def place(model: Path, scratch: Path) -> Place:
    return Place(model, scratch / "no layout", scratch)


def test_installed_runtimes_load_the_folder_and_agree(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    reference = runtimes.reference_of(genai_dirs["nbl"], 8)
    found = runtimes.table(place(genai_dirs["nbl"], tmp_path), reference, PYTHON)
    assert [row["result"] for row in found] == [runtimes.EQUAL] * 2
    assert all(row["version"] and row["given"] == "model/ as it is" for row in found)


def test_other_tokens_are_seen(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    """A folder with other weights than the reference was made with."""
    reference = runtimes.reference_of(genai_dirs["original"], 8)
    assert reference.tokens != runtimes.reference_of(genai_dirs["nbl"], 8).tokens
    found = runtimes.table(place(genai_dirs["nbl"], tmp_path), reference, PYTHON)
    assert len(found) == len(PYTHON) >= 2
    assert all(row["result"].startswith("differs: at token ") for row in found), found


def test_a_folder_that_does_not_load_fails_with_what_the_runtime_said(
    genai_dirs: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(genai_dirs["nbl"], tmp_path / "model"))
    reference = runtimes.reference_of(model, 4)
    (model / "model.onnx").write_bytes(b"no graph")
    found = runtimes.table(place(model, tmp_path), reference, PYTHON)
    assert len(found) == len(PYTHON) >= 2
    assert all(row["result"].startswith("failed: ") for row in found), found
    assert all("model.onnx" in row["result"] for row in found), found


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ({"tokens": [7, 8, 1]}, runtimes.EQUAL),
        ({"tokens": [7, 8, 1, 9]}, runtimes.EQUAL),  # went on behind the end of text
        ({"tokens": [7, 8, 1], "prompt_ids": [5, 6]}, runtimes.EQUAL),
        ({"tokens": [7, 8]}, "differs: at token 2 of 3"),
        ({"tokens": [7, 9, 1]}, "differs: at token 1 of 3"),
        ({"tokens": []}, "differs: at token 0 of 3"),
        ({"tokens": [7, 8, 1], "prompt_ids": [0, 5, 6]}, "differs: the prompt is [0, 5, 6]"),
    ],
)
def test_judgement(answer: dict[str, Any], result: str) -> None:
    assert runtimes.judge(REFERENCE, answer).startswith(result)


def test_what_is_not_here_is_listed_with_the_reason(tmp_path: Path) -> None:
    def absent(place: Place, asked: object) -> list[str]:
        raise Missing("buy it")

    gone = Row("abacus", "beads", absent)
    broken = dataclasses.replace(gone, command=lambda place, asked: [str(tmp_path / "nothing")])
    found = runtimes.table(place(tmp_path, tmp_path), REFERENCE, [gone, broken])
    assert found[0] == {"runtime": "abacus", "version": None, "given": "beads", "result": "not run: buy it"}
    assert found[1]["result"].startswith("failed: ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--only", "abacus"], "no such row"), (["--new-tokens", "1"], "genai_config.json is missing")],
)
def test_a_wrong_call_is_explained(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        runtimes.main([str(tmp_path), *arguments])
    assert said in capsys.readouterr().err


def test_javascript_packages_are_pinned() -> None:
    packages = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    locked = json.loads((HERE / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in packages} == packages
    assert all("resolved" not in entry for entry in locked.values())


@pytest.mark.fuzz
def test_the_command_prints_the_table(genai_dirs: dict[str, Path], tmp_path: Path) -> None:
    """All rows, on the tiny model: those installed here agree, the others say what is missing."""
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), str(genai_dirs["nbl"]), "--screenshot", str(tmp_path / "page.png")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {row["runtime"]: row["result"] for row in json.loads(done.stdout)["runtimes"]}
    assert list(found) == [row.name for row in catalogue.ROWS]
    assert all(result == runtimes.EQUAL or result.startswith("not run: ") for result in found.values()), found
    if found["transformers.js, Chromium, WebAssembly, streamed"] == runtimes.EQUAL:
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
