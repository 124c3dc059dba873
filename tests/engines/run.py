"""Runs the tests of one engine in the environment that environments.toml describes, and makes that environment first.

    python tests/engines/run.py NAME [DIRECTORY]        DIRECTORY: where environments are kept, .engines by default

The tests run in this Python. Those of the engine start the other one, which NBL_NAME_PYTHON names.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def main(name: str, directory: str = ".engines") -> int:
    """Returns pytest's status."""
    table = tomllib.loads(Path(__file__).with_name("environments.toml").read_text(encoding="utf-8"))
    if name not in table:
        sys.exit(f"no engine {name}; environments.toml has {', '.join(table)}")
    home = (ROOT / directory / name).resolve()
    made = _made(home, table[name])
    words = [sys.executable, "-m", "pytest", "-q", "-m", table[name]["marker"], "tests/engines"]
    environment = {**os.environ, f"NBL_{name.upper().replace('-', '_')}_PYTHON": str(made)}
    return subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode


def _made(home: Path, wanted: dict[str, Any]) -> Path:
    """The Python of an environment, made anew if its row or pyproject.toml changed."""
    python, record = home / "bin" / "python", home / ".made"
    row = json.dumps(wanted, sort_keys=True).encode() + (ROOT / "pyproject.toml").read_bytes()
    key = hashlib.sha256(row).hexdigest()
    if not record.is_file() or record.read_text(encoding="utf-8") != key:
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        _pip(python, wanted["packages"], "install")
        _pip(python, wanted.get("bare"), "install", "--no-deps")
        _pip(python, wanted.get("removed"), "uninstall", "--yes")
        record.write_text(key, encoding="utf-8")
    elif any(package.startswith(".") for package in wanted["packages"]):
        _pip(python, ["."], "install", "--no-deps")
    return python


def _pip(python: Path, packages: Sequence[str] | None, *words: str) -> None:
    if packages:
        command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words, *packages]
        subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
