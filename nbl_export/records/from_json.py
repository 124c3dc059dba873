"""Reads records from JSON that somebody may have edited; every value must have the type of its field."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nbl_export.errors import CorruptError

__all__ = ["edited", "read_record", "require"]

T = TypeVar("T")


@contextlib.contextmanager
def edited(place: Path, advice: str) -> Iterator[None]:
    """Within: values of a file are used that somebody may have edited and hashed again.

    Raises:
        CorruptError: a value is missing, of the wrong kind, or no number.
    """
    from jinja2 import TemplateError

    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        TemplateError,
    ) as error:
        raise CorruptError(f"{place} holds values that do not fit ({error!r}); {advice}") from error


def read_record(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from the values of its fields. Lists are accepted for tuples, and whole numbers for floats.

    Raises:
        TypeError: a value has another type, is missing, or belongs to no field.
        ValueError: the record refuses the values.
    """
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _fits(value, hints[name]):
            raise TypeError(f"{name!r} is of the wrong kind")
    assert dataclasses.is_dataclass(kind)
    return typing.cast(T, kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}))


def _fits(value: Any, hint: Any) -> bool:
    parts = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(v, parts[0]) for v in value)
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, (int, hint)) and abs(value) < 1 << 63
    return isinstance(value, hint)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
