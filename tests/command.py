"""The command line, called in this process or in a fresh one, and what it must leave alone."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from nbl_export.options.command import KEYS_FILE

__all__ = [
    "BARE", "TINY", "Outcome", "assert_refused", "configured", "in_new_process", "keys", "nbl",
    "repeated", "shorten_parts", "snapshot", "stage_lines", "text_is_read",
]  # fmt: skip

# A run that is as small as the options allow: a few seconds.
_TINY = {
    "layers": "1", "fit": "independent", "context": 64, "depth": "0", "repetitions": 1, "prompt-tokens": "16",
    "generate-tokens": 4, "compute-dtype": "float32",
}  # as tiny.toml has it  # fmt: skip
TINY = ("--config", str(Path(__file__).parent / "tiny.toml"), "--calibration-tokens", "1024")
BARE = ("--config", str(Path(__file__).parent / "bare.toml"), *TINY[2:])  # for an NBL checkpoint
_STAGE = re.compile(
    r"^(text|calibrate|plan|decoder graph|rewrite|verify|bench|report)( \.\.\.|: reused|: done in [\d.]+ s)$"
)


def shorten_parts() -> None:
    """A quarter of the windows for each use of text. All jobs of the tests have it, so they agree on what is done."""
    from nbl_export.text import windows

    windows.PART_TOKENS.update({roles: tokens // 4 for roles, tokens in windows.PART_TOKENS.items()})


@dataclass(frozen=True)
class Outcome:
    """Exit status and what was said. A defect that would show as a traceback has one in `err`."""

    status: int
    out: str
    err: str


def nbl(*arguments: object) -> Outcome:
    """`nbl-export ARGUMENTS` in this process."""
    from nbl_export.cli import app

    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    status: object = 0
    with (
        mock.patch.object(sys, "argv", ["nbl-export", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            app.main()
        except SystemExit as end:
            status = end.code
        except Exception:
            status = 1
            err.write(traceback.format_exc())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert isinstance(status, int), status
    return Outcome(status, out.getvalue(), err.getvalue())


def in_new_process(*arguments: object, code: str = "", **environment: str) -> Outcome:
    """`nbl-export ARGUMENTS` in a fresh interpreter, after running `code` there."""
    script = f"import sys\n{code}\nfrom nbl_export.cli.app import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def stage_lines(outcome: Outcome) -> dict[str, str]:
    """Stage title -> "reused" or "done", in the order they came; the stage text, which every job has, is left out."""
    found = (_STAGE.match(line) for line in outcome.err.splitlines())
    return {m[1]: m[2].strip(" :").split()[0] for m in found if m and m[2] != " ..." and m[1] != "text"}


def text_is_read(outcome: Outcome) -> bool:
    """Whether the stage text has read and split a text."""
    return "text: done" in outcome.err


def keys(**values: object) -> tuple[str, ...]:
    """--config FILE with these values."""
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    file = Path(_files(), f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.toml")
    file.write_text(text, encoding="utf-8")
    return "--config", str(file)


@functools.cache
def _files() -> str:
    made = tempfile.mkdtemp(prefix="nbl-tests-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def configured(**values: object) -> tuple[str, ...]:
    """The configuration file that takes the place of TINY's, with these values beside its own."""
    return keys(**{**_TINY, **values})


def repeated(command: str) -> list[str]:
    """The arguments of a command that `options.command` says, with its keys in a file."""
    words = shlex.split(command)
    if words[0] == "printf":  # printf '%s\\n' KEY ... > keys.toml && nbl-export --config keys.toml ...
        file = Path(_files(), f"{hashlib.sha256(command.encode()).hexdigest()[:16]}.toml")
        file.write_text("\n".join(words[2 : words.index(">")]), encoding="utf-8")
        words = [str(file) if word == KEYS_FILE else word for word in words[words.index("&&") + 1 :]]
    assert words[0] == "nbl-export"
    return words[1:]


def assert_refused(outcome: Outcome, status: int, *parts: object) -> None:
    """One sentence on stderr that holds all `parts`, beside what stages say; nothing on stdout."""
    lines = (line for line in outcome.err.splitlines() if not line.startswith(("  ", "estimate: ")))
    said = [line for line in lines if not _STAGE.match(line) and ": left out, " not in line]
    assert outcome.status == status, outcome
    assert outcome.out == "", outcome
    assert len(said) == 1, outcome
    assert said[0].startswith("nbl-export: "), outcome
    for part in parts:
        assert str(part) in said[0], (str(part), said[0])


def snapshot(directory: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file, the lock left out."""
    return dict(_hashes(directory))


def _hashes(directory: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != ".lock":
            yield str(path.relative_to(directory)), hashlib.sha256(path.read_bytes()).hexdigest()
