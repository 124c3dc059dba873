"""What the README tells a newcomer to type exists and works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .command import nbl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs(finished: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "runs/demo/model" in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace("runs/demo/model", str(finished / "model"))],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is")


def test_every_flag_exists() -> None:
    commands = sorted(set(re.findall(r"nbl-export ([a-z]+) ", README)) - {"on"})
    helps = {name: nbl(name, "--help").out for name in commands} | {"": nbl("--help").out}
    assert {"plan", "rewrite", "verify", "bench", "generate", "build", "inspect"} <= set(commands)
    every = " ".join(helps.values())
    flags = set(re.findall(r"`?(--[a-z][a-z-]+)", README)) - {"--provider", "--no-deps"}  # said not to be there; pip's
    assert len(flags) > 10
    assert [flag for flag in sorted(flags) if flag not in every] == []


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_files_that_it_names_are_there() -> None:
    for name in re.findall(r"`((?:bench|nbl_export|graphs)/[\w./-]+\.\w+)`", README) + re.findall(
        r"\]\((bench/[^)]+)\)", README
    ):
        assert (ROOT / name).exists(), name


TABLES = ROOT / "bench" / "tables.py"


def test_tables_are_those_of_the_raw_results() -> None:
    done = subprocess.run([sys.executable, TABLES, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_figure_that_no_result_has_is_found(tmp_path: Path) -> None:
    for name in ("tables.py", "tables_speed.py", "tables_quality.py"):
        (tmp_path / "bench").mkdir(exist_ok=True)
        (tmp_path / "bench" / name).write_text((TABLES.parent / name).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "bench" / "results").symlink_to(TABLES.parent / "results")
    row = next(line for line in README.splitlines() if line.startswith("| prefill of 512 tokens |"))
    (tmp_path / "README.md").write_text(README.replace(row, row.replace("×1", "×2")), encoding="utf-8")
    again = [sys.executable, str(tmp_path / "bench" / "tables.py"), "--check"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"+ {row}" in done.stderr
