"""Allows only files and directories in an untrusted folder. Reading a pipe blocks, and a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from nbl_export.errors import CorruptError

__all__ = ["entries", "refuse_special"]


def refuse_special(place: Path) -> None:
    """Refuse pipes, sockets and devices: the path itself, or entries of a directory and of its directories.

    Links are followed.

    Raises:
        CorruptError: names the entry that is a pipe, a socket or a device.
    """
    for path in entries(place):
        try:
            mode = path.stat().st_mode
        except OSError:  # a dangling or circular link counts as absent
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CorruptError(f"{path} is no file but a pipe, a socket or a device; remove it")


def entries(place: Path) -> list[Path]:
    """Entries of a directory and of its directories, or the file itself; links are not followed.

    Raises:
        CorruptError: a directory cannot be read.
    """
    try:
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        below = [e for entry in found if entry.is_dir() and not entry.is_symlink() for e in sorted(entry.iterdir())]
    except OSError as error:
        raise CorruptError(f"{error.filename} cannot be read: {error.strerror}") from error
    return found + below
