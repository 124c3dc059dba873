"""The run directory: one manifest, hashed files, stages that are finished or absent, never in between.

    DIR/nbl.json               the manifest (this module's `RunDirectory` reads and writes it)
    DIR/moments.safetensors    calibrate; calibrate.partial.safetensors while it works
    DIR/sampled.safetensors    calibrate --data-free: the tokens
    DIR/maps.safetensors       plan; distill, where it was asked for (then plan leaves start.safetensors)
    DIR/sweep.json             sweep, where it was asked for
    DIR/distill.json           distill; distill.partial.safetensors while it works
    DIR/original/              decoder: the exported graph; as it came in all_logits.onnx where model.onnx gives the
                               logits of the last token, as in model/
    DIR/model/                 rewrite: the NBL graph, deployable by itself
    DIR/model/README.md        card, where it was asked for
    DIR/verify.json            verify
    DIR/eval.json              eval, where it was asked for
    DIR/engine/{original,model}/ build: compiled, deployable by itself
    DIR/bench.json             bench
    DIR/report.{html,md,json}  report
    DIR/nbl-checkpoint/        save-checkpoint
    DIR/checkpoint/            a GGUF brought to safetensors, where the model was one

A stage writes into a scratch directory and its results are renamed into place. Before that its record, and
those of all stages that read it, leave the manifest, so that a kill at any moment leaves either the old state,
or a stage that is simply not there yet. Changed options reach the manifest with the first stage that finishes
under them, so that a command that is refused changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nbl_export.contained import check_inside
from nbl_export.errors import BusyError, CorruptError, NblError
from nbl_export.plain_files import entries, refuse_special
from nbl_export.records import DecoderSpec, JobOptions, LayerScore, Plan
from nbl_export.typed_json import read_record

__all__ = ["SCHEMA", "RunDirectory", "file_sha256", "friendly_os_errors", "key_of", "move_into_place", "refuse_foreign",
           "refuse_occupied", "stream_sha256", "write_json"]  # fmt: skip

SCHEMA = 1
_NO_RUN = "{} is not a run directory: it has no nbl.json; nbl-export --output makes one"
_SCRATCH = ".tmp-"


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: Any) -> str:
    """Hex digest of what is left of an open file, read in blocks."""
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


_WRITE_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def friendly_os_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a sentence, whichever library met it."""
    try:
        yield
    except Exception as error:
        number, filename = _disk_trouble(error)
        reasons = {
            errno.ENOSPC: f"no space left on the disk of {where}; free some or choose another --output",
            errno.EDQUOT: f"the disk quota of {where} is used up; free some space or choose another --output",
            errno.EACCES: f"no permission to write {filename or where}; choose another --output",
            errno.EROFS: f"{where} is on a read-only file system; choose another --output",
            errno.EFBIG: f"a file in {where} grew beyond the file-size limit; raise it or choose another --output",
        }
        explained = isinstance(error, NblError) and number not in _WRITE_ONLY  # e.g. a text that cannot be read
        if number not in reasons or explained:
            raise
        raise NblError(reasons[number]) from error


def _disk_trouble(error: BaseException | None) -> tuple[int | None, str | None]:
    """Error number and file of the OSError that an exception is, comes from or quotes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, error.filename
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, in Rust
            return int(quoted[1]), None
        if re.search(r"\d+ requested and \d+ written", str(error)):  # numpy's tofile keeps no number
            return errno.ENOSPC, None
        error = error.__cause__
    return None, None


def _refuse_odd_lock(path: Path) -> None:
    """The lock is opened to write and emptied, so it must be a file of this directory alone.

    Raises:
        CorruptError: it is a link, has another name elsewhere, or is no plain file.
    """
    with contextlib.suppress(FileNotFoundError), friendly_os_errors(path):
        seen = path.lstat()
        if not stat.S_ISREG(seen.st_mode) or seen.st_nlink > 1:
            raise CorruptError(f"{path} is a link or not a plain file; remove it")


def _remove(path: Path) -> None:
    """Remove a file, a directory or a link, whichever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
            refuse_foreign(path)
            _make(path)
        elif not (path / "nbl.json").is_file():
            raise NblError(_NO_RUN.format(path))
        _refuse_odd_lock(path / ".lock")
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
            with contextlib.suppress(OSError):
                cls(path)._sweep()  # an interrupt may come between making a scratch directory and using it
            lock.release()

    @classmethod
    def peek(cls, path: Path) -> RunDirectory:
        """Read the manifest, empty if there is none, without the lock: for looking on while a run works.

        Raises:
            CorruptError: its manifest cannot be read.
        """
        run = cls(path)
        run._read()
        return run

    @classmethod
    def existing(cls, path: Path) -> RunDirectory:
        """As `peek`, of a directory that holds a run.

        Raises:
            NblError: it holds none. CorruptError: its manifest cannot be read.
        """
        run = cls.peek(path)
        if not run.manifest:
            raise NblError(_NO_RUN.format(path))
        return run

    def _sweep(self) -> None:
        """Remove what a killed process left unfinished."""
        for leftover in self.path.glob(f"{_SCRATCH}*"):
            _remove(leftover)

    def _read(self) -> None:
        path = self.path / "nbl.json"
        refuse_special(self.path)
        for entry in entries(self.path):
            if entry.name != ".lock":  # which has a check of its own
                check_inside(entry, self.path)
        if (self.path / "genai_config.json").exists():
            raise NblError(f"{self.path} is a model directory, not a run directory; name the directory it is in")
        if not path.exists():
            return
        advice = "restore it, or start over with --force"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CorruptError(f"{path} cannot be read ({error}); {advice}") from error
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:
            raise CorruptError(
                f"{path} has schema {schema}, this version reads {SCHEMA}; "
                "use the version that wrote it, or start over with --force"
            )
        try:
            _check_manifest(manifest)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CorruptError(f"{path} is not a manifest of nbl-export ({error}); {advice}") from error
        self.manifest = manifest

    # -- the manifest ----------------------------------------------------------------------------------

    @property
    def stages(self) -> dict[str, Any]:
        """Records of finished stages by name: key, seconds, files."""
        stages: dict[str, Any] = self.manifest.setdefault("stages", {})
        return stages

    def note(self, **facts: Any) -> None:
        """Merge facts into the manifest, to be written with the next `save`."""
        self.manifest = {"schema": SCHEMA, "status": "incomplete", "stages": {}, **self.manifest, **facts}

    def save(self, **facts: Any) -> None:
        """Merge facts into the manifest and write it."""
        self.note(**facts)
        write_json(self.path / "nbl.json", self.manifest)

    def _reset(self) -> None:
        """Forget everything. Only names that this tool writes are removed, the manifest last."""
        for name in _OURS:
            _remove(self.path / name)

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

    def finish(self, stage: str, key: str, scratch: Path, seconds: float, readers: Sequence[str], **facts: Any) -> None:
        """Move everything in `scratch` into place and record the stage; stages that read it are forgotten.

        A failed verification stays on record until it, or what it read, is done again.
        """
        hashes = {
            str(path.relative_to(scratch)): file_sha256(path) for path in sorted(scratch.rglob("*")) if path.is_file()
        }
        for name in (stage, *readers):
            self.stages.pop(name, None)
        failed = self.manifest["status"] == "failed" and "verify" in self.stages
        self.save(status="failed" if failed else "incomplete")
        for entry in sorted(scratch.iterdir()):
            target = self.path / entry.name
            if target.is_dir():
                _remove(target)
            os.replace(entry, target)
        self.stages[stage] = {"key": key, "seconds": round(seconds, 3), "files": hashes}
        self.save(**facts)

    def partial(self, stage: str) -> Path:
        """Where a long stage keeps what it has so far, to go on from after a kill; removed once it is finished."""
        return self.path / f"{stage}.partial.safetensors"

    def read_json(self, name: str) -> Any:
        """A JSON result of a finished stage."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CorruptError(f"{self.path / name} cannot be read ({error}); run its stage again") from error


_OURS = (
    "moments.safetensors",
    "calibrate.partial.safetensors",
    "sampled.safetensors",
    "start.safetensors",
    "maps.safetensors",
    "distill.json",
    "distill.partial.safetensors",
    "sweep.json",
    "original",
    "model",
    "verify.json",
    "eval.json",
    "engine",
    "bench.json",
    "report.html",
    "report.md",
    "report.json",
    "nbl-checkpoint",
    "checkpoint",
    "nbl.json",
)


def _check_manifest(manifest: Any) -> None:
    """Raise what comes up where a value that the stages rely on is missing or of the wrong kind."""
    _require(manifest, schema=int, status=str, command=str, stages=dict)
    _require(manifest["model"], name=str, fingerprint=str)
    _require(manifest["calibration"], name=str, sha256=str)
    for record in manifest["stages"].values():
        _require(record, key=str, seconds=(int, float), files=dict)
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in record["files"]):
            raise ValueError("a stage names a file outside the run")
    _require(manifest["options"], model=str, engine=str, precision=str)
    JobOptions.from_json(manifest["options"])
    spec = read_record(DecoderSpec, manifest["decoder"])
    places = manifest.get("places", {})
    _require({"model": None, **places}, model=(str, type(None)))
    if manifest["options"].get("quantized_model") is not None:
        _require(manifest["quantized"], name=str, fingerprint=str, place=(str, type(None)))
    absent = {"logits": None, "method": None}
    _require({**absent, **manifest}, logits=(str, type(None)), method=(str, type(None)))
    if not all(isinstance(text, str) for text in _listed(places.get("calibration", []))):
        raise TypeError("'places' is of the wrong kind")
    if "plan" in manifest["stages"]:
        for score in manifest["scores"]:
            read_record(LayerScore, score)
        plan = {"replaced": manifest["replaced_layers"], "tap": manifest["tap"], "select": manifest["select"]}
        read_record(Plan, {"num_layers": spec.num_layers, **plan})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _require(values: dict[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name!r} is of the wrong kind")


def _make(path: Path) -> None:
    """Create the directory where it is not there."""
    try:
        str(path).encode("utf-8")  # the manifest will hold it
        with friendly_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NblError(f"{path} cannot be a directory: a file is in the way; choose another --output") from error
    except UnicodeEncodeError as error:
        raise NblError(f"{str(path)!r} is not a name in UTF-8; choose another --output") from error
    except OSError as error:
        raise NblError(f"{path} cannot be made: {error.strerror}; choose another --output") from error


def refuse_foreign(path: Path) -> None:
    """An existing directory must be empty or a run directory: nothing of the user's is ever touched.

    Raises:
        NblError: it is neither.
    """
    try:
        entries = [p.name for p in path.iterdir()] if path.is_dir() else []
        is_file = path.is_file()
    except OSError as error:
        raise NblError(f"{path} cannot be looked into: {error.strerror}; choose another --output") from error
    if is_file:
        raise NblError(f"{path} is a file; choose another --output")
    if "genai_config.json" in entries:
        raise NblError(f"{path} is a model directory, not a run directory; choose another --output")
    strangers = [name for name in entries if name != ".lock" and not name.startswith(_SCRATCH)]
    if strangers and "nbl.json" not in entries:
        raise NblError(
            f"{path} is not empty and not a run directory (it holds {sorted(strangers)[0]}); choose another --output"
        )


def refuse_occupied(target: Path) -> None:
    """A directory that is to be written must be new or empty.

    Raises:
        NblError: it is a file, or holds something.
    """
    try:
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise NblError(f"{target} cannot be looked into: {error.strerror}; choose another --output") from error
    if occupied:
        raise NblError(f"{target} is there already; choose another --output, or remove it")


def move_into_place(made: Path, target: Path) -> Path:
    """Rename a finished directory to `target` (by way of a name beside it, where that is another file system).

    What was at `target` is replaced.
    """
    _make(target.parent)
    with friendly_os_errors(target):
        beside = target.with_name(f"{_SCRATCH}{target.name}-{os.getpid()}")
        try:
            shutil.move(made, beside)
            if target.exists() or target.is_symlink():
                _remove(target)
            os.replace(beside, target)
        finally:
            if beside.exists():
                _remove(beside)
    return target


def versions(packages: Sequence[str]) -> Mapping[str, str]:
    """Installed versions of packages, for the manifest; absent ones are left out."""
    import importlib.metadata as metadata

    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
