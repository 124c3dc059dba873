"""Everything in an untrusted folder is a file or a directory of it. A link out of it is refused, never followed.

    DIR/merges.txt -> ~/.ssh/id_rsa                                 refused
    DIR/additional_chat_templates/.a.jinja -> ~/.ssh/id_rsa         refused
    CACHE/models--org--name/snapshots/REVISION/config.json -> ../../blobs/HASH [-> CACHE/blobs/HA/HASH]      followed

The third line is how the hub's cache keeps a model. The file has a hash for a name and is in the same cache.
A pipe, a socket or a device is refused too: reading a pipe blocks, and a device never ends.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from pathlib import Path

from nbl_export.errors import CorruptError, NblError

__all__ = ["check_folder", "check_inside", "is_inside", "refuse_special"]

_HASH = re.compile(r"[0-9a-f]{40,64}")
_REVISION = re.compile(r"[0-9a-f]{40}")
_PAIR = re.compile(r"[0-9a-f]{2}")
_UNREAD = (Path(".git"), Path(".cache", "huggingface"))  # bookkeeping of git and the hub: no part of a model
_MOST_ENTRIES = 100_000
_MOST_DEPTH = 32


def is_inside(file: Path, directory: Path) -> bool:
    """Whether a path, with all links followed, is in a directory, or is a file of the hub's cache linked from there."""
    try:
        os.stat(file)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a circle, or more links than any system follows
            return False
    except ValueError:  # an invalid name
        return False
    try:
        home = directory.resolve()
        target = file.resolve()
    except (OSError, RuntimeError, ValueError):  # removed meanwhile
        return False
    return target.is_relative_to(home) or _is_blob(target, home)


def _is_blob(target: Path, home: Path) -> bool:
    """Whether the hub's cache keeps a file for the snapshot `home`."""
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if not _REVISION.fullmatch(home.name) or not _HASH.fullmatch(target.name) or not target.is_file():
        return False
    shared = target.parent.parent == repository.parent / "blobs" and bool(_PAIR.fullmatch(target.parent.name))
    return target.parent == repository / "blobs" or shared


def check_inside(file: Path, directory: Path) -> Path:
    """Return the path, if no link on the way leads out of the directory.

    Raises:
        CorruptError: a link on the way leads out of the directory.
    """
    if not is_inside(file, directory):
        raise CorruptError(
            f"{file} is a link out of its directory, which is not followed; remove it, or copy the model with its "
            "links followed (cp -rL) and use the copy"
        )
    return file


def check_folder(directory: Path) -> None:
    """Check every entry of a model, run or deployed folder at any depth, because libraries choose what they open in it.

    Hidden entries are checked too. Only the bookkeeping of git and of the hub is left out, and no link may lead there.

    Raises:
        CorruptError: names an entry that is a link out of the folder, a pipe, a socket or a device.
        NblError: the folder holds more, or is deeper, than the folder of any model.
    """
    waiting = [Path()]
    seen = 0
    while waiting:
        below = waiting.pop()
        entries = _entries(directory / below, _MOST_ENTRIES - seen)
        seen += len(entries)
        if seen > _MOST_ENTRIES or len(below.parts) > _MOST_DEPTH:
            raise NblError(
                f"{directory} holds more than {_MOST_ENTRIES:,} files or {_MOST_DEPTH} levels of directories, which no "
                "model does; name the folder of the model alone, or its file"
            )
        for entry in entries:
            name = below / entry.name
            if entry.is_symlink():
                _check_link(directory / name, directory)
            elif not entry.is_dir(follow_symlinks=False):
                if not entry.is_file(follow_symlinks=False):
                    refuse_special(directory / name)
            elif name not in _UNREAD:
                waiting.append(name)


def _entries(place: Path, most: int) -> list[os.DirEntry[str]]:
    """Entries in the order of their names; at most one more than `most`."""
    try:
        with os.scandir(place) as found:
            return sorted(itertools.islice(found, most + 1), key=lambda entry: entry.name)
    except FileNotFoundError:  # another process works in the folder
        return []
    except OSError as error:
        raise CorruptError(f"{place} cannot be read: {error.strerror}") from error


def _check_link(link: Path, directory: Path) -> None:
    refuse_special(link)
    check_inside(link, directory)
    home = directory.resolve()
    target = link.resolve()
    unread = any(target.is_relative_to(home / name) for name in _UNREAD)
    if unread and target.is_dir():
        raise CorruptError(f"{link} is a link into {target}, which is not checked; replace it by a copy (cp -rL)")


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
