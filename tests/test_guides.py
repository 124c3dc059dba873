"""What CONTRIBUTING.md and SECURITY.md name is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from nbl_export import decoders, engines
from nbl_export.engines.base import Capabilities

from .command import nbl

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md")}
_FILE = r"`((?:nbl_export|tests|graphs|bench)/[\w./-]*|[\w.-]+\.(?:md|toml))`"


@pytest.mark.parametrize("guide", TEXTS)
def test_files_are_there(guide: str) -> None:
    named = {name for name in re.findall(_FILE, TEXTS[guide]) if "NAME" not in name}
    named |= {f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", TEXTS[guide])}
    assert len(named) > 4
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("guide", TEXTS)
def test_commands_and_flags_are_there(guide: str) -> None:
    helps = " ".join([nbl("--help").out, *(nbl(name, "--help").out for name in ("card", "push", "rewrite"))])
    flags = set(re.findall(r"`(?:[a-z-]+ )*(--[a-z-]+)`", TEXTS[guide]))
    assert flags and [flag for flag in sorted(flags) if flag not in helps] == []
    scripts = re.findall(r"`python ([\w/]+\.py)", TEXTS[guide])
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)", TEXTS["CONTRIBUTING.md"], re.M))))
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_names_in_code() -> None:
    """Words of the guide that are not files."""
    assert set(decoders.SOURCES) <= set(decoders.PRECISIONS)
    assert "ENGINES" in engines.__all__
    assert "sources" in Capabilities.__dataclass_fields__
    text = (ROOT / "tests" / "tiny.py").read_text(encoding="utf-8")
    assert "EVERY = " in text and "_SPECIAL: " in text
    render = (ROOT / "graphs" / "render.py").read_text(encoding="utf-8")
    assert "CASES = " in render and "_EXPORTER = " in render
