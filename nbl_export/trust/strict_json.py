"""Reads JSON objects so that this tool and any library understand a file in the same way.

Refused are a name that occurs twice (libraries differ in which value they take), numbers that JSON does not have,
nesting that crashes a parser, and a file larger than any real file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError

__all__ = ["read_object"]

_ADVICE = "fetch the model again, or export it again"


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The object in a file.

    Raises:
        NblError: the file cannot be read, is larger than `most_bytes`, or is not one object with distinct names.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise ValueError(f"it is larger than {most_bytes >> 10} KiB")
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise NblError(f"{path} cannot be read ({_short(error)}); {_ADVICE}") from error
    if not isinstance(found, dict):
        raise NblError(f"{path} cannot be read (it is not a model configuration, which is an object); {_ADVICE}")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
