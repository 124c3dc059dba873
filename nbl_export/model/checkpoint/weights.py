"""The weights files that transformers loads of a checkpoint directory. Every reader of weights asks here.

DIR/model.safetensors                  one file
DIR/model.safetensors.index.json       the files that the index names
both                                   refused, because libraries differ in which of them they load
"""

from __future__ import annotations

from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.files import read_json
from nbl_export.trust.contained import check_inside

__all__ = ["INDEX", "WEIGHTS", "weight_files"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def weight_files(directory: Path) -> list[Path]:
    """The files of the weights, in the order of their names.

    Raises:
        NblError: there are none, the directory has one file and an index of others, or the index is damaged.
        CorruptError: a file is a link out of the directory.
    """
    index = directory / INDEX
    single = (directory / WEIGHTS).is_file()
    if not index.exists():
        if not single:  # otherwise transformers looks for a pickle
            raise NblError(f"{directory} has no safetensors weights{_hint(directory)}")
        return [check_inside(directory / WEIGHTS, directory)]
    names = _indexed(index)
    files = [check_inside(directory / name, directory) for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise NblError(f"{directory} lacks {missing[0]}, which its index names; fetch the model again")
    if single and names != [WEIGHTS]:
        raise NblError(
            f"{directory} has {WEIGHTS} and {INDEX}, which names other files; remove the one that is not of this model"
        )
    return files


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or name == ".."]
    except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
        raise NblError(f"{index} cannot be read ({error}); fetch the model again") from error
    if not names:
        raise NblError(f"{index} names no file; fetch the model again")
    if outside:
        raise NblError(f"{index} names a file outside {index.parent}; this checkpoint is not to be trusted")
    return names


def _hint(directory: Path) -> str:
    """What lies there instead."""
    pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
    other = [file.name for file in sorted(directory.glob("*.safetensors"))]
    hint = f"; {other[0]} is not named {WEIGHTS}, and no index names it" if other else ""
    return hint + (f"; {pickled[0].name} is a pickle, which is not read: convert it to safetensors" if pickled else "")
