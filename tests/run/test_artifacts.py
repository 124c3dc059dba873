"""The run directory survives a kill at every single change it makes to the file system."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export.errors import NblError
from nbl_export.files import friendly_os_errors

pytestmark = pytest.mark.process

# Each change that Python makes to the file system raises an audit event. The script does the same work again and
# again, and dies at the first, the second, ... event, until it comes through; each time the work is then finished.
_SCRIPT = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from nbl_export.run_directory import RunDirectory

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}
MANIFEST = {
    "command": "nbl-export", "options": {"model": "m", "engine": "ort", "precision": "fp32"},
    "sources": [], "model": {"name": "m", "fingerprint": "f"},
    "calibration": {"name": "t", "sha256": "s"},
    "decoder": dict(architecture="llama", num_layers=2, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=2,
                    vocab_size=8, max_positions=16),
}

def work(where, version):
    with RunDirectory(where).opened(create=True, force=version == "over again") as run:
        if not run.manifest:
            run.save(**MANIFEST)
        for stage, readers in (("decoder", ["verify"]), ("verify", [])):
            if run.is_done(stage, version):
                continue
            with run.scratch() as out:
                if stage == "decoder":
                    (out / "original").mkdir()
                    for name in ("original/model.onnx", "original/model.onnx.data", "bench.json"):
                        (out / name).write_text(version)
                else:
                    (out / "verify.json").write_text(version)
                run.finish(stage, version, out, 0.0, readers, status="verified")

def content(where):
    # without the command, which names the directory
    lines = {str(p.relative_to(where)): p.read_text().splitlines() for p in where.rglob("*") if p.is_file()}
    return {name: [line for line in text if not line.startswith(' "command": ')] for name, text in lines.items()}

def die_at(last):
    count = itertools.count(1)
    def hook(event, arguments):
        if event in CHANGES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)) and next(count) == last:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

top = Path(sys.argv[1])
for before, after in ((None, "first"), ("first", "second"), ("first", "over again")):
    start, expected, where = top / f"{before}", top / f"{before} {after}", top / "run"
    if before:
        work(start, before)
        shutil.copytree(start, expected)
    work(expected, after)
    for last in itertools.count(1):
        if before:
            shutil.copytree(start, where)
        child = os.fork()
        if child == 0:
            die_at(last)
            work(where, after)
            os._exit(0)
        came_through = os.waitpid(child, 0)[1] == 0
        found = RunDirectory.peek(where)
        for stage in found.manifest.get("stages", {}):
            if after != "over again":  # a directory that is being emptied may lack files, which is found out
                found.check(stage)
        work(where, after)
        assert content(where) == content(expected), (before, after, last)
        shutil.rmtree(where)
        if came_through:
            break
    print(before, after, last)
"""


def test_kill_at_every_change(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    moments = [int(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(moments) == 3
    assert min(moments) > 20


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


WRITES = {
    "no space": (OSError(errno.ENOSPC, "x"), "no space left on the disk of out"),
    "quota": (OSError(errno.EDQUOT, "x"), "the disk quota of out"),
    "limit": (OSError(errno.EFBIG, "x"), "a file in out grew beyond the file-size limit"),
    "permission": (PermissionError(errno.EACCES, "x", "out/file"), "no permission to write out/file"),
    "read-only": (OSError(errno.EROFS, "x", "out/file"), "out is on a read-only file system"),
    "Rust": (RuntimeError("Error while serializing: I/O error: No space (os error 28)"), "no space left on the disk"),
    "numpy": (OSError("4096 requested and 2560 written"), "no space left on the disk"),
    "an exporter's": (caused(NblError("cannot export"), OSError(errno.ENOSPC, "x", "out/f")), "no space left"),
}


@pytest.mark.parametrize("case", WRITES)
def test_trouble_with_the_disk_is_one_sentence(case: str) -> None:
    error, sentence = WRITES[case]
    with pytest.raises(NblError, match=sentence) as caught, friendly_os_errors(Path("out")):
        raise error
    assert "choose another directory" in str(caught.value)


def test_other_errors_pass() -> None:
    """Among them a sentence about a file that cannot be read: that is not the output's trouble."""
    explained = caused(NblError("text cannot be read"), PermissionError(errno.EACCES, "x", "text"))
    for error in (explained, ValueError("5 of 6"), FileNotFoundError(errno.ENOENT, "x", "file"), OSError("odd")):
        with pytest.raises(type(error)) as caught, friendly_os_errors(Path("out")):
            raise error
        assert caught.value is error
