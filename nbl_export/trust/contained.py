"""Links in an untrusted folder: a link that leads out of the folder is refused, never followed.

    DIR/merges.txt -> ~/.ssh/id_rsa                                 refused
    CACHE/models--org--name/snapshots/REVISION/config.json -> ../../blobs/HASH [-> CACHE/blobs/HA/HASH]      followed

The second line is how the hub's cache keeps a model. The file has a hash for a name and is in the same cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from nbl_export.errors import CorruptError

__all__ = ["check_inside", "is_inside", "refuse_links_out"]

_HASH = re.compile(r"[0-9a-f]{40,64}")
_PAIR = re.compile(r"[0-9a-f]{2}")
_READ_BELOW = ("additional_chat_templates", "onnx")  # folders in which libraries look for files of a model


def is_inside(file: Path, directory: Path) -> bool:
    """Whether a path, with all links followed, is in a directory, or is a file of the hub's cache linked from there."""
    try:
        home, target = directory.resolve(), file.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, or an invalid name
        return False
    return target.is_relative_to(home) or _is_blob(target, home)


def _is_blob(target: Path, home: Path) -> bool:
    """Whether the hub's cache keeps a file for the snapshot `home`."""
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return False
    if not _HASH.fullmatch(target.name) or not target.is_file():
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
            f"{file} is a link out of its directory, which is not followed; copy the model with its links followed "
            "(cp -rL) and use the copy"
        )
    return file


def refuse_links_out(directory: Path) -> None:
    """Check every entry of a model's folder with `check_inside`, because libraries choose what they open in it.

    Raises:
        CorruptError: names the entry that is a link out of the directory.
    """
    for place in (directory, *(directory / name for name in _READ_BELOW)):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if not entry.name.startswith("."):
                check_inside(entry, directory)
