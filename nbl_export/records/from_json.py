"""Reads records from JSON that somebody may have edited; every value must have the type of its field."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nbl_export.errors import CorruptError

__all__ = ["check_shape", "edited", "read_record", "require"]

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

    Objects are accepted for dataclasses, which are made of them.

    Raises:
        TypeError: a value has another type, is missing, or belongs to no field.
        ValueError: the record refuses the values.
    """
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(value, hints.get(name, object), name) for name, value in values.items()})


def _read(value: Any, hint: Any, name: str) -> Any:
    parts = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind is types.UnionType:
        for part in parts:
            with contextlib.suppress(TypeError):
                return _read(value, part, name)
    elif kind is tuple and isinstance(value, tuple | list) and (parts[-1] is ... or len(parts) == len(value)):
        return tuple(_read(v, parts[0] if parts[-1] is ... else parts[k], name) for k, v in enumerate(value))
    elif kind is dict and isinstance(value, dict):
        return {_read(k, parts[0], name): _read(v, parts[1], name) for k, v in value.items()}
    elif kind in (int, float):
        if not isinstance(value, bool) and isinstance(value, int | kind) and abs(value) < 1 << 63:
            return value
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return read_record(typing.cast(type, kind), value)
    elif isinstance(value, kind):
        return value
    raise TypeError(f"{name!r} is of the wrong kind")


def check_shape(value: Any, shape: Any, name: str = "all of it") -> None:
    """Compare a value of JSON with a shape, in the notation of `records.shapes`.

    Raises:
        TypeError: a value is missing or of another kind; the message names it.
        ValueError: a record refuses its values.
    """
    if not isinstance(shape, list | dict):
        _read(value, shape, name)
    elif not isinstance(value, type(shape)):
        raise TypeError(f"{name!r} is of the wrong kind")
    elif isinstance(shape, list):
        for one in value:
            check_shape(one, shape[0], name)
    else:
        for key, inner in shape.items():
            for known, one in _members(value, key):
                check_shape(one, inner, known)


def _members(value: Any, key: Any) -> Iterable[tuple[str, Any]]:
    """Names and values that a key of a shape means."""
    if key is str:
        return list(value.items())
    if not key.endswith("?"):
        if key not in value:
            raise TypeError(f"{key!r} is missing")
        return [(key, value[key])]
    found = value.get(key[:-1])
    return [] if found is None else [(key[:-1], found)]


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
