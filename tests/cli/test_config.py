"""Options in one place: the command line, a configuration file, help and the recorded command are made from it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.cli.commands import COMMANDS
from nbl_export.cli.options import read_config
from nbl_export.errors import NblError, UsageError
from nbl_export.options.option import MAIN
from nbl_export.options.options import OPTIONS
from nbl_export.options.options import flag_of as flag

from ..command import assert_refused, nbl
from ..jobs import until

pytestmark = [pytest.mark.job, pytest.mark.process]

ROOT = Path(__file__).parents[2]


def written(directory: Path, text: str, name: str = "job.toml") -> Path:
    (directory / name).write_text(text, encoding="utf-8")
    return directory / name


# -- help --------------------------------------------------------------------------------------------------------


def test_the_first_page_is_short_and_the_rest_is_behind_it() -> None:
    first, everything = nbl("--help"), nbl("--help-all")
    assert (first.status, everything.status) == (0, 0)
    assert len(first.out.splitlines()) <= 60
    for name in COMMANDS:
        found = [re.search(rf"^  {name} ", page.out, re.MULTILINE) is not None for page in (first, everything)]
        assert found == [not COMMANDS[name].hidden, True], name
    for name, said in OPTIONS.items():
        word = name if said.key else flag(name)
        shown = re.search(rf"^  {word}\b", first.out, re.MULTILINE) is not None
        assert shown == (said.first and MAIN in said.commands), name
        assert (re.search(rf"^  {word}\b", everything.out, re.MULTILINE) is not None) == (MAIN in said.commands)


def test_the_page_of_options_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "usage.py", "--check"], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- a file ------------------------------------------------------------------------------------------------------


def test_a_file_says_what_flags_say(tmp_path: Path) -> None:
    text = """
    model = "m"
    layers = 8
    calibration = ["a.txt", "b.jsonl"]
    max-seq-len = 64
    label_weight = 0.2
    depth = "0,2048"
    prompt_tokens = [1, 2]
    threads = 4
    """
    expected = {
        "model": "m", "layers": "8", "calibration": ("a.txt", "b.jsonl"), "max_seq_len": 64, "label_weight": 0.2,
        "depths": (0, 2048), "prompt_tokens": (1, 2), "threads": 4,
    }  # fmt: skip
    assert read_config(written(tmp_path, text)) == (expected, None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("layer = 8", ("layer is no option", "did you mean layers?")),
        ("layers = 8 9", ("cannot be read",)),
        ("seed = 'one'", ("'seed' is of the wrong kind",)),
        ("repetitions = 0", ("repetitions must be at least 1",)),
        ("depth = 'many'", ("--depth", "0,2048")),
        ("depth = ['many']", ("'depths' is of the wrong kind",)),
        ("prompt_tokens = []", ("prompt_tokens needs a number",)),
        ("tap = 'side'", ("key tap is residual or normed",)),
        ("layers = " + "[" * 5000, ("cannot be read",)),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_is_written(
    text: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    file, out = written(tmp_path, text), tmp_path / "out"
    done = nbl("--model", "m", "--config", file, "--output", out)
    assert_refused(done, 2, *parts)
    assert not out.exists()


def test_a_file_that_is_not_there_or_too_large(tmp_path: Path) -> None:
    large = written(tmp_path, "# " + "x" * (1 << 20))
    for file, part in ((tmp_path / "none.toml", "cannot be read"), (large, "larger than")):
        with pytest.raises(NblError, match=part):
            read_config(file)


def test_another_run_s_files_are_found_from_any_directory(tmp_path: Path) -> None:
    recorded = {
        "options": {"model": "m", "quantized_model": "q", "calibration": ["a.txt"]},
        "places": {"model": "/home/m", "calibration": ["/home/a.txt"]},
        "quantized": {"name": "q", "title": "q", "fingerprint": "", "place": "/home/q", "method": None,
                      "group_size": None},
    }  # fmt: skip
    file = tmp_path / "nbl.json"
    file.write_text(json.dumps(recorded), encoding="utf-8")
    _, found = read_config(file)
    assert found is not None
    assert (found.model, found.quantized_model, found.calibration) == ("/home/m", "/home/q", ("/home/a.txt",))
    file.write_text(json.dumps({**recorded, "places": {"model": 5}}), encoding="utf-8")
    with pytest.raises(UsageError, match="'model' is of the wrong kind"):
        read_config(file)


def test_another_run_s_manifest_is_a_configuration_and_flags_win(finished: Path, tmp_path: Path) -> None:
    recorded = json.loads((finished / "nbl.json").read_text(encoding="utf-8"))
    asked, found = read_config(finished / "nbl.json")
    assert found is not None and not asked
    assert found.model == recorded["places"]["model"] and list(found.depths) == recorded["options"]["depths"]
    run = tmp_path / "run"
    with until("plan"):
        done = nbl("--config", finished / "nbl.json", "--layers", "0,2", "--output", run)
    assert done.status == 0, done.err
    options = json.loads((run / "nbl.json").read_text(encoding="utf-8"))["options"]
    expected = {
        **recorded["options"],
        "layers": "0,2",
        "model": options["model"],
        "calibration": options["calibration"],
    }
    assert options == expected
    assert (
        written(tmp_path, "{}", "empty.json") and nbl("--config", tmp_path / "empty.json", "--output", run).status == 2
    )
