"""Targets of make and tests that CONTRIBUTING.md and SECURITY.md name are there. Their links: `test_docs`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "SECURITY.md")}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)", TEXTS["CONTRIBUTING.md"], re.M))))
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_tests_that_security_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", TEXTS["SECURITY.md"]))
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert named
    assert sorted(named - there) == []
