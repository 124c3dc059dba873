"""What may lie in a folder from a stranger: files and directories. A pipe would be waited for, a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from nbl_export.errors import CorruptError

__all__ = ["entries", "refuse_special"]


def refuse_special(place: Path) -> None:
    """Hold a file, or what lies in a directory and in the directories in it, to files and directories.

    Links are followed.

    Raises:
        CorruptError: which entry is a pipe, a socket or a device.
    """
    for path in entries(place):
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing, or in a circle: as good as absent
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CorruptError(f"{path} is no file but a pipe, a socket or a device; remove it")


def entries(place: Path) -> list[Path]:
    """What lies in a directory and in the directories in it, or the file itself; links are not followed.

    Raises:
        CorruptError: it cannot be looked into.
    """
    try:
        found = sorted(place.iterdir()) if place.is_dir() else [place]
        below = [e for entry in found if entry.is_dir() and not entry.is_symlink() for e in sorted(entry.iterdir())]
    except OSError as error:
        raise CorruptError(f"{error.filename} cannot be looked into: {error.strerror}") from error
    return found + below
