"""Allows only files and directories. Reading a pipe blocks, and a device never ends."""

from __future__ import annotations

import stat
from pathlib import Path

from nbl_export.errors import CorruptError

__all__ = ["refuse_special"]


def refuse_special(path: Path) -> None:
    """Refuse a pipe, a socket or a device. Links are followed; what does not exist passes.

    Raises:
        CorruptError: names the path.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # a dangling or circular link counts as absent
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptError(f"{path} is no file but a pipe, a socket or a device; remove it")
