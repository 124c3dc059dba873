"""Compiled engines and kernels that this user made on this machine, or has said yes to. They are code.

    ~/.cache/nbl-export/engines/HASH      an empty file for each, named by the hash of the compiled file

The list is used only if nobody else may write to it.
"""

from __future__ import annotations

import contextlib
import re
import stat
from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.trust.file_hashes import cache_file, is_ours

__all__ = ["is_own", "remember"]


def _list() -> Path:
    return cache_file().parent / "engines"


def is_own(digest: str) -> bool:
    """Whether the user has made, or said yes to, the compiled file with this SHA-256."""
    home = _list()
    with contextlib.suppress(OSError):
        ours = all(is_ours(folder.lstat(), stat.S_ISDIR) for folder in (home.parent, home))
        named = re.fullmatch("[0-9a-f]{64}", digest) is not None
        return ours and named and is_ours((home / digest).lstat(), stat.S_ISREG)
    return False


def remember(digest: str) -> None:
    """Add the SHA-256 of a compiled file.

    Raises:
        NblError: the list cannot be written, or others may write to it.
    """
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
