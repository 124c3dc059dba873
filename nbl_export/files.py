"""Hashes, JSON, safetensors headers and directories on disk. Files and directories are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from nbl_export.errors import NblError

__all__ = [
    "PACKAGE",
    "SMALL_BYTES",
    "arrays_sha256",
    "file_sha256",
    "friendly_os_errors",
    "is_scratch",
    "key_of",
    "make_folder",
    "move_into_place",
    "parse_json",
    "read_json",
    "read_small",
    "refuse_occupied",
    "remove",
    "replaced",
    "replacing",
    "safetensors_header",
    "safetensors_tensors",
    "scratch_in",
    "stream_sha256",
    "write_json",
]

PACKAGE = Path(__file__).parent  # the folder of nbl_export
_SCRATCH = ".nbl-export-"
SMALL_BYTES = 16 << 20


def file_sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as stream:
        return stream_sha256(stream)


def stream_sha256(stream: Any) -> str:
    """Hex digest of the rest of an open file, read in blocks."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def key_of(*parts: Any) -> str:
    """Fingerprint of the inputs of a stage: equal inputs give equal keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def arrays_sha256(arrays: Mapping[str, Any]) -> str:
    """Hex digest of names, types, shapes and bytes of NumPy arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read_small(path: Path, most_bytes: int = SMALL_BYTES) -> bytes:
    """All bytes of a file that is small in every model and run; of a larger one nothing is read.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is larger than `most_bytes`.
    """
    with path.open("rb") as stream:
        larger = os.fstat(stream.fileno()).st_size > most_bytes
        data = b"" if larger else stream.read(most_bytes + 1)
    if larger or len(data) > most_bytes:  # it may grow meanwhile
        raise ValueError(f"it is larger than {most_bytes / (1 << 20):g} MiB")
    return data


def read_json(path: Path, most_bytes: int = SMALL_BYTES, **how: Any) -> Any:
    """The value in a small JSON file; `how` is for `json.loads`.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is too large, not UTF-8, not JSON, or nested too deeply.
    """
    return parse_json(read_small(path, most_bytes), **how)


def parse_json(text: str | bytes, **how: Any) -> Any:
    """The value in JSON of a file or of a process; `how` is for `json.loads`.

    Raises:
        ValueError: the text is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), **how)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new file, never half of one."""
    with replacing(path) as stream:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
        stream.write(f"{text}\n".encode())


def safetensors_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """First bytes of a safetensors file that is written tensor by tensor, and the place of each tensor in the file.

    The library safetensors needs all tensors at once; for names in their order, it writes these bytes too.

    Args:
        tensors: type, such as BF16, and shape of each; they follow each other in this order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        bits = re.search(r"\d+", dtype)  # BOOL has a byte
        begin = end
        end = end + (int(bits[0]) // 8 if bits else 1) * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    begin = 8 + len(raw)
    return len(raw).to_bytes(8, "little") + raw, {name: begin + header[name]["data_offsets"][0] for name in tensors}


def safetensors_tensors(file: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor of a safetensors file, in their order; offsets are in the file.

    The library checks the header and its size first.

    Raises:
        NblError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="np"), file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header: dict[str, dict[str, Any]] = parse_json(stream.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise NblError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error
    header.pop("__metadata__", None)
    for facts in header.values():
        facts["data_offsets"] = [8 + size + offset for offset in facts["data_offsets"]]
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))


@contextlib.contextmanager
def scratch_in(directory: Path) -> Iterator[Path]:
    """A new directory below `directory`, removed afterwards in any case.

    It has a random name, was not there before, and only this user may enter it. So nobody can have put a link into it.
    """
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_scratch(path: Path) -> bool:
    """Whether a path is a directory that `scratch_in` makes, which a killed process leaves behind."""
    made = re.fullmatch(rf"{re.escape(_SCRATCH)}[a-z0-9_]{{8}}", path.name)  # as `tempfile` names it
    return made is not None and path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place for a file that becomes `path` at the end, when its bytes are on the disk, and not at all after an error.

    For libraries that take a name; see `replacing` for a stream.
    """
    with scratch_in(path.parent) as scratch:
        made = scratch / path.name
        yield made
        with made.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(made, path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file `path`, as in `replaced`."""
    with replaced(path) as made, made.open("wb") as stream:
        yield stream


_WRITE_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def friendly_os_errors(where: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into an NblError with advice, whichever library failed."""
    try:
        yield
    except Exception as error:
        number, filename = _disk_trouble(error)
        reasons = {
            errno.ENOSPC: f"no space left on the disk of {where}; free some or choose another directory",
            errno.EDQUOT: f"the disk quota of {where} is used up; free some space or choose another directory",
            errno.EACCES: f"no permission to write {filename or where}; choose another directory",
            errno.EROFS: f"{where} is on a read-only file system; choose another directory",
            errno.EFBIG: f"a file in {where} grew beyond the file-size limit; raise it or choose another directory",
        }
        explained = isinstance(error, NblError) and number not in _WRITE_ONLY  # e.g. a text that cannot be read
        if number not in reasons or explained:
            raise
        raise NblError(reasons[number]) from error


def _disk_trouble(error: BaseException | None) -> tuple[int | None, str | None]:
    """Error number and file of the OSError that an exception is, is caused by, or quotes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, error.filename
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors, in Rust
            return int(quoted[1]), None
        if re.search(r"\d+ requested and \d+ written", str(error)):  # numpy's tofile keeps no number
            return errno.ENOSPC, None
        error = error.__cause__
    return None, None


def remove(path: Path) -> None:
    """Remove a file, a directory or a link; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Create a directory if it is missing."""
    try:
        str(path).encode("utf-8")  # the manifest will hold the path
        with friendly_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NblError(f"{path} cannot be a directory: a file is in the way; choose another --output") from error
    except UnicodeEncodeError as error:
        raise NblError(f"{str(path)!r} is not a name in UTF-8; choose another --output") from error
    except OSError as error:
        raise NblError(f"{path} cannot be made: {error.strerror}; choose another --output") from error


def refuse_occupied(target: Path) -> None:
    """Require that a directory to be written is new or empty.

    Raises:
        NblError: `target` is a file, or a directory with content.
    """
    try:
        occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise NblError(f"{target} cannot be looked into: {error.strerror}; choose another --output") from error
    if occupied:
        raise _there_already(target)


def _there_already(target: Path) -> NblError:
    return NblError(f"{target} is there already; choose another --output, or remove it")


def move_into_place(made: Path, target: Path) -> Path:
    """Rename a finished directory to `target`, which is missing or empty.

    The directory first moves to a name beside `target`, since it may come from another file system.

    Raises:
        NblError: something has been put there meanwhile. It stays.
    """
    make_folder(target.parent)
    with friendly_os_errors(target), scratch_in(target.parent) as scratch:
        beside = scratch / target.name
        shutil.move(made, beside)
        try:
            os.replace(beside, target)  # fails for a file, a link, and a directory with content
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _there_already(target) from error
    return target


def versions(packages: Sequence[str]) -> Mapping[str, str]:
    """Installed versions of packages, for the manifest; missing packages are left out."""
    import importlib.metadata as metadata

    found = {}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
