"""What may lie in a folder from a stranger: files and directories. A pipe would be waited for, a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from nbl_export.errors import CorruptError

__all__ = ["refuse_special"]


def refuse_special(directory: Path) -> None:
    """Hold what lies in a directory, and in the directories in it, to files and directories, with links followed.

    Raises:
        CorruptError: which entry is a pipe, a socket or a device.
    """
    inside = [directory] if directory.is_dir() else []
    for place in inside:
        for entry in sorted(place.iterdir()):
            try:
                mode = entry.stat().st_mode
            except OSError:  # a link to nothing, or in a circle: as good as absent
                continue
            if stat.S_ISDIR(mode):
                if place == directory and not entry.is_symlink():
                    inside.append(entry)
            elif not stat.S_ISREG(mode):
                raise CorruptError(f"{entry} is no file but a pipe, a socket or a device; remove it")
