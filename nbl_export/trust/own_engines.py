"""The compiled engines and kernels of this user: code that was made on this machine, or that the user said yes to.

    ~/.cache/nbl-export/engines/HASH      an empty file for each, named by the hash of the compiled file

The list is used only if nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError

__all__ = ["cache_folder", "is_own", "remember"]

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder() -> Path:
    """What this user's cache keeps between runs."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "nbl-export"


def _list() -> Path:
    return cache_folder() / "engines"


def _is_ours(seen: os.stat_result, kind: Any) -> bool:
    """Whether an entry is of a kind (a function of `stat`) and only this user may write to it."""
    owned = not hasattr(os, "geteuid") or (seen.st_uid == os.geteuid() and not seen.st_mode & _OTHERS_WRITE)
    return owned and bool(kind(seen.st_mode))


def is_own(digest: str) -> bool:
    """Whether the user has made, or said yes to, the compiled file with this SHA-256."""
    home = _list()
    with contextlib.suppress(OSError):
        ours = all(_is_ours(folder.lstat(), stat.S_ISDIR) for folder in (home.parent, home))
        return ours and _is_digest(digest) and _is_ours((home / digest).lstat(), stat.S_ISREG)
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
