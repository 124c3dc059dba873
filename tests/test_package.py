"""What is installed: a wheel that holds everything, by its own name and version; shell completion; `python -m`."""

from __future__ import annotations

import email.policy
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .command import in_new_process

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent
VERSION = "9.8.7"


def call(*command: object, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, cwd=cwd, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources in which the one line with the version says another one."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "nbl_export", source / "nbl_export", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    init = source / "nbl_export" / "version.py"
    text, count = re.subn(r'(__version__ = )".*"', rf'\1"{VERSION}"', init.read_text(encoding="utf-8"))
    assert count == 1
    init.write_text(text, encoding="utf-8")
    out = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", out)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel installed alone, in a directory of its own."""
    out = tmp_path_factory.mktemp("site")
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", out, wheel)
    return out


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nbl_export").rglob("*.py")}
    files = {"nbl_export/py.typed", "nbl_export/report/report.html.jinja", "nbl_export/publish/card.md.jinja"}
    assert {name for name in names if not name.startswith(f"nbl_export-{VERSION}.dist-info/")} == package | files


def test_metadata(wheel: Path) -> None:
    found = email.message_from_string(
        zipfile.ZipFile(wheel).read(f"nbl_export-{VERSION}.dist-info/METADATA").decode("utf-8"),
        policy=email.policy.default,
    )
    assert (found["Name"], found["Version"]) == ("nbl-export", VERSION)
    assert found["Description-Content-Type"].startswith("text/markdown")
    readme, said = (ROOT / "README.md").read_text(encoding="utf-8"), str(found.get_payload())
    links = [target for _, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", said)]
    assert links and all(link.startswith("https://") for link in links), links
    assert len(said.split()) > 0.95 * len(readme.split()) and "![" not in said
    assert found["Project-URL"] == "Method, https://arxiv.org/abs/2505.21077"
    assert wheel.stat().st_size < 1_000_000
    assert {"export", "cpu", "gpu", "eval"} <= set(found.get_all("Provides-Extra", []))
    plain = [r for r in found.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert plain and not any(re.match("torch|transformers|onnx|matplotlib", r) for r in plain)


def test_installed_alone_it_runs(site: Path, tmp_path: Path) -> None:
    def run(*command: object) -> list[str]:
        return call(*command, cwd=tmp_path, PYTHONPATH=str(site)).split()

    where = "import nbl_export, importlib.metadata as m; print(nbl_export.__file__, m.version('nbl-export'))"
    assert run(sys.executable, "-c", where) == [str(site / "nbl_export" / "__init__.py"), VERSION]
    assert run(sys.executable, "-m", "nbl_export", "--version") == [VERSION]
    assert run(site / "bin" / "nbl-export", "--version") == [VERSION]


# -- completion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shell", "sign"), [("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --no")])
def test_completion_script(shell: str, sign: str) -> None:
    done = in_new_process(_NBL_EXPORT_COMPLETE=f"{shell}_source")
    assert done.status == 0, done.err
    assert sign in done.out and in_new_process("--show-completion", shell).out == done.out
    assert f"_NBL_EXPORT_COMPLETE={shell}_complete" in done.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    shim = tmp_path / "nbl-export"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m nbl_export "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    script = tmp_path / "completion"
    script.write_text(in_new_process(_NBL_EXPORT_COMPLETE="bash_source").out, encoding="utf-8")

    def complete(*words: str) -> list[str]:
        typed = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _nbl_export_completion nbl-export"
        asked = f'source {script}; {typed}; echo "${{COMPREPLY[@]}}"'
        return call("bash", "-c", asked, PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(ROOT)).split()

    assert complete("nbl-export", "gen") == ["generate"]
    assert complete("nbl-export", "ca") == ["card"]  # calibrate is for developers
    assert complete("nbl-export", "card", "--base") == ["--base-model"]
