"""The run directory: one manifest, hashed files, stages that are finished or absent, never in between.

    DIR/nbl.json               the manifest (this module's `RunDirectory` reads and writes it)
    DIR/moments.safetensors    calibrate
    DIR/maps.safetensors       plan
    DIR/original/              decoder: the exported graph, untouched
    DIR/model/                 rewrite: the NBL graph, deployable by itself
    DIR/verify.json            verify
    DIR/bench.json             bench
    DIR/report.{html,md,json}  report
    DIR/checkpoint/            a GGUF brought to safetensors, where the model was one

A stage writes into a scratch directory and its results are renamed into place. Before that its record, and
those of all stages after it, leave the manifest, so that a kill at any moment leaves either the old state,
or a stage that is simply not there yet.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nbl_export.errors import BusyError, CorruptError, NblError

__all__ = ["SCHEMA", "RunDirectory", "file_sha256", "friendly_os_errors", "key_of", "write_json"]

SCHEMA = 1
_SCRATCH = ".tmp-"


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if _HAS_FILE_DIGEST else _digest(stream)


_HAS_FILE_DIGEST = hasattr(hashlib, "file_digest")  # Python 3.11


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """Fingerprint of the inputs of a stage: equal inputs, equal key."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one, never half of it."""
    scratch = path.with_name(f"{_SCRATCH}{path.name}-{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def friendly_os_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a sentence."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: f"no space left on the disk of {where}; free some or choose another --output",
            errno.EDQUOT: f"the disk quota of {where} is used up; free some space or choose another --output",
            errno.EACCES: f"no permission to write {error.filename or where}; choose another --output",
            errno.EROFS: f"{where} is on a read-only file system; choose another --output",
            errno.EFBIG: f"a file in {where} is larger than the file system or the file-size limit allows",
        }
        if error.errno not in reasons:
            raise
        raise NblError(reasons[error.errno]) from error


class RunDirectory:
    """A run directory that this process holds the lock of. Use `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: dict[str, Any] = {}

    # -- opening ---------------------------------------------------------------------------------------

    @classmethod
    @contextlib.contextmanager
    def open_run(cls, path: Path, *, create: bool, force: bool = False) -> Iterator[RunDirectory]:
        """Lock the directory and read its manifest; `force` with `create` forgets what it holds instead.

        Raises:
            BusyError: another process holds it.
            NblError: it is not a run directory (or, with create, a directory with other things in it).
            CorruptError: its manifest cannot be read.
        """
        if create:
            _refuse_foreign(path)
            with friendly_os_errors(path):
                try:
                    path.mkdir(parents=True, exist_ok=True)
                except (FileExistsError, NotADirectoryError) as error:
                    raise NblError(
                        f"{path} cannot be a directory: a file is in the way; choose another --output"
                    ) from error
        elif not (path / "nbl.json").is_file():
            raise NblError(f"{path} is not a run directory: it has no nbl.json; nbl-export --output makes one")
        with friendly_os_errors(path):
            lock = FileLock(str(path / ".lock"), timeout=0)
            try:
                lock.acquire()
            except Timeout as error:
                raise BusyError(
                    f"{path} is in use by another nbl-export; wait for it or use another --output"
                ) from error
        try:
            run = cls(path)
            with friendly_os_errors(path):
                run._sweep()
                if create and force:
                    run._reset()
                run._read()
                yield run
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove what a killed process left unfinished."""
        for leftover in self.path.glob(f"{_SCRATCH}*"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink()

    def _read(self) -> None:
        path = self.path / "nbl.json"
        if not path.exists():
            return
        advice = "restore it, or start over with --force"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise CorruptError(f"{path} cannot be read ({error}); {advice}") from error
        if not isinstance(manifest, dict) or not isinstance(manifest.get("stages"), dict):
            raise CorruptError(f"{path} is not a manifest of nbl-export; {advice}")
        if manifest.get("schema") != SCHEMA:
            raise CorruptError(
                f"{path} has schema {manifest.get('schema')!r}, this version reads {SCHEMA}; "
                "use the version that wrote it, or start over with --force"
            )
        self.manifest = manifest

    # -- the manifest ----------------------------------------------------------------------------------

    @property
    def stages(self) -> dict[str, Any]:
        """Records of finished stages by name: key, seconds, files."""
        stages: dict[str, Any] = self.manifest.setdefault("stages", {})
        return stages

    def save(self, **facts: Any) -> None:
        """Merge facts into the manifest and write it."""
        self.manifest = {"schema": SCHEMA, **self.manifest, **facts}
        write_json(self.path / "nbl.json", self.manifest)

    def _reset(self) -> None:
        """Forget everything. Only names that this tool writes are removed, the manifest last."""
        for name in _OURS:
            target = self.path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)

    # -- stages ----------------------------------------------------------------------------------------

    def is_done(self, stage: str, key: str) -> bool:
        """True when the stage was finished from the same inputs and its files are all there, unharmed.

        Raises:
            CorruptError: a file is there but not what the stage wrote.
        """
        record = self.stages.get(stage)
        if not isinstance(record, dict) or record.get("key") != key:
            return False
        if any(not (self.path / name).is_file() for name in record["files"]):
            return False
        self.check(stage)
        return True

    def check(self, stage: str) -> None:
        """Compare the files of a finished stage with their recorded hashes."""
        for name, expected in self.stages[stage]["files"].items():
            path = self.path / name
            if not path.is_file():
                raise CorruptError(f"{path} is missing; run the {stage} stage again (the same command does)")
            if file_sha256(path) != expected:
                raise CorruptError(
                    f"{path} is corrupted: its hash is not the one recorded by the {stage} stage; "
                    "delete it to have it made again, or start over with --force"
                )

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory on the same file system, removed afterwards whatever happens."""
        directory = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.path))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def finish(self, stage: str, key: str, scratch: Path, seconds: float, later: Sequence[str], **facts: Any) -> None:
        """Move everything in `scratch` into place and record the stage; `later` stages are forgotten."""
        hashes = {
            str(path.relative_to(scratch)): file_sha256(path) for path in sorted(scratch.rglob("*")) if path.is_file()
        }
        for name in (stage, *later):
            self.stages.pop(name, None)
        self.save(status="incomplete")
        for entry in sorted(scratch.iterdir()):
            target = self.path / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
        self.stages[stage] = {"key": key, "seconds": round(seconds, 3), "files": hashes}
        self.save(**facts)

    def read_json(self, name: str) -> Any:
        """A JSON result of a finished stage."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptError(f"{self.path / name} cannot be read ({error}); run its stage again") from error


_OURS = (
    "moments.safetensors",
    "maps.safetensors",
    "original",
    "model",
    "verify.json",
    "bench.json",
    "report.html",
    "report.md",
    "report.json",
    "checkpoint",
    "nbl.json",
)


def _refuse_foreign(path: Path) -> None:
    """An existing directory must be empty or a run directory: nothing of the user's is ever touched."""
    if not path.exists() or (path / "nbl.json").exists():
        return
    if not path.is_dir():
        raise NblError(f"{path} is a file; choose another --output")
    strangers = [p.name for p in path.iterdir() if p.name not in (*_OURS, ".lock") and not p.name.startswith(_SCRATCH)]
    if strangers:
        raise NblError(
            f"{path} is not empty and not a run directory (it holds {sorted(strangers)[0]}); choose another --output"
        )


def versions(packages: Sequence[str]) -> Mapping[str, str]:
    """Installed versions of packages, for the manifest; absent ones are left out."""
    import importlib.metadata as metadata

    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
