"""The table of runtimes: what is here says what the run's own runner says; what is not here, or errs, is told apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parents[1] / "bench" / "runtimes"
sys.path.insert(0, str(HERE))  # as for a script
import rows as catalogue  # noqa: E402
import run as runtimes  # noqa: E402
from rows import Place  # noqa: E402

PYTHON = tuple(row for row in catalogue.ROWS if "Python" in row.name)  # what every developer has


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


def test_javascript_packages_are_pinned() -> None:
    packages = json.loads((HERE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    locked = json.loads((HERE / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert {name: locked[f"node_modules/{name}"]["version"] for name in packages} == packages
    assert all("resolved" not in entry for entry in locked.values())
