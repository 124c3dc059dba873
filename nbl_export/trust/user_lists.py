"""What this user's cache remembers between runs: SHA-256 of large files, and the compiled engines of their own.

    ~/.cache/nbl-export/hashes.json     path -> size, times, inode, device and hash of the file when it was read

The list only saves time and may be lost at any moment. A list that is damaged, writable by others, or a link is not
used. A changed file has another change time (ctime), which only the operating system sets.

    ~/.cache/nbl-export/engines/HASH      an empty file for each, named by the hash of the compiled file

Compiled engines and kernels are code: this user made them on this machine, or has said yes to them. Their list is used
only if nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.files import file_sha256, read_json, write_json

__all__ = ["cache_file", "is_ours", "is_own", "remember", "sha256_of"]

_KEPT_BYTES = 16 << 20  # smaller files are hashed again
_MOST_ENTRIES = 1000
_MOST_CACHE_BYTES = 8 << 20
_SETTLED_SECONDS = 2.0  # a file that changed more recently may change again within one tick of its timestamp
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
Facts = list[Any]  # size, mtime_ns, ctime_ns, inode, device


def sha256_of(files: Sequence[Path]) -> list[str]:
    """Hex digest of each file.

    Raises:
        OSError: a file cannot be read.
    """
    known = _load()
    found = {file: _facts(file) for file in files}
    names = {file: str(file.resolve()) for file in files}
    fresh = {f: known[names[f]][1] for f in files if names[f] in known and known[names[f]][0] == found[f]}
    missing = [file for file in found if file not in fresh]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        fresh |= dict(zip(missing, pool.map(file_sha256, missing), strict=True))
    learnt = {names[f]: [found[f], fresh[f]] for f in missing if _is_settled(f, found[f])}
    if learnt:
        _save({**known, **learnt})
    return [fresh[file] for file in files]


def _facts(file: Path) -> Facts:
    seen = file.stat()
    return [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]


def _is_settled(file: Path, before: Facts) -> bool:
    """Whether a file is large enough to remember, and did not change while it was read or just before."""
    size, modified, changed = before[:3]
    latest = max(modified, changed) / 1e9
    return size >= _KEPT_BYTES and latest < time.time() - _SETTLED_SECONDS and _facts(file) == before


def cache_file() -> Path:
    """The file that keeps the remembered hashes."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nbl-export" / "hashes.json"


def _load() -> dict[str, Any]:
    """The remembered entries; none if the list cannot be trusted."""
    path = cache_file()
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if not (is_ours(path.parent.lstat(), stat.S_ISDIR) and is_ours(path.lstat(), stat.S_ISREG)):
            return {}
        value = read_json(path, _MOST_CACHE_BYTES)
        return {name: entry for name, entry in value.items() if _is_entry(entry)} if isinstance(value, dict) else {}
    return {}


def is_ours(seen: os.stat_result, kind: Any) -> bool:
    """Whether an entry is of a kind (a function of `stat`) and only this user may write to it."""
    owned = not hasattr(os, "geteuid") or (seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS_WRITE)
    return owned and bool(kind(seen.st_mode))


def _is_entry(entry: Any) -> bool:
    facts, digest = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
    numbers = isinstance(facts, list) and all(type(number) is int for number in facts)
    return numbers and isinstance(digest, str) and _is_digest(digest)


def _save(entries: dict[str, Any]) -> None:
    path = cache_file()
    with contextlib.suppress(OSError, ValueError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_ours(path.parent.lstat(), stat.S_ISDIR):
            write_json(path, dict(list(entries.items())[-_MOST_ENTRIES:]))


def _list() -> Path:
    return cache_file().parent / "engines"


def is_own(digest: str) -> bool:
    """Whether the user has made, or said yes to, the compiled file with this SHA-256."""
    home = _list()
    with contextlib.suppress(OSError):
        ours = all(is_ours(folder.lstat(), stat.S_ISDIR) for folder in (home.parent, home))
        return ours and _is_digest(digest) and is_ours((home / digest).lstat(), stat.S_ISREG)
    return False


def _is_digest(text: str) -> bool:
    """Whether a text is a SHA-256, and so no path."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def remember(digest: str) -> None:
    """Add the SHA-256 of a compiled file.

    Raises:
        NblError: `digest` is no SHA-256, the list cannot be written, or others may write to it.
    """
    if not _is_digest(digest):
        raise NblError(f"{digest!r} is no SHA-256 of a compiled file; build the engine again")
    home = _list()
    with contextlib.suppress(OSError):
        for folder in (home.parent, home):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (home / digest).touch(mode=0o600)
    if not is_own(digest):
        raise NblError(
            f"{home}, which lists the engines of your own, cannot be written, or others may write to it; set "
            "XDG_CACHE_HOME to a directory of your own"
        )
