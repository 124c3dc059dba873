"""The lock of a directory: one process works in it, and the lock file cannot lead to another place."""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from nbl_export.errors import BusyError, CorruptError
from nbl_export.files import friendly_os_errors

__all__ = ["locked"]


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold DIRECTORY/.lock.

    Raises:
        BusyError: another process holds the lock.
        CorruptError: the lock file is a link, has another hard link, or is no plain file.
    """
    path = directory / ".lock"
    _refuse_odd_lock(path)
    with friendly_os_errors(directory):
        lock = FileLock(str(path), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BusyError(
                f"{directory} is in use by another nbl-export; wait for it or use another --output"
            ) from error
    try:
        yield
    finally:
        lock.release()


def _refuse_odd_lock(path: Path) -> None:
    """Refuse a lock file that other places share, because the file is opened for writing and emptied.

    Raises:
        CorruptError: the lock file is a link, has another hard link, or is no plain file.
    """
    with contextlib.suppress(FileNotFoundError), friendly_os_errors(path):
        seen = path.lstat()
        if not stat.S_ISREG(seen.st_mode) or seen.st_nlink > 1:
            raise CorruptError(f"{path} is a link or not a plain file; remove it")
