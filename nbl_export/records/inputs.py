"""Inputs of a stage: values, and values that are loaded at first use with what identifies them.

@dataclass(frozen=True)
class SomeInputs:             identity_of ─► JSON values, of which the stage's key is made
    steps: int                the value itself
    model: Lazy[Model]        its identity: the fingerprint of the checkpoint
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Lazy", "identity_of", "lazy"]

T = TypeVar("T")


class Lazy(Generic[T]):
    """A value that is loaded at first use. Equal identities stand for equal values.

    Args:
        identity: a JSON value; None if the value only changes what is shown.
    """

    def __init__(self, identity: Any, load: Callable[[], T]) -> None:
        self.identity = identity
        self._load = load
        self._loaded: list[T] = []

    @property
    def value(self) -> T:
        """The value, kept until `forget`."""
        if not self._loaded:
            self._loaded.append(self._load())
        return self._loaded[0]

    @property
    def is_loaded(self) -> bool:
        return bool(self._loaded)

    def forget(self) -> None:
        """Free the value; the next use loads it again."""
        self._loaded.clear()


def lazy(identity: Callable[[Any], object]) -> Callable[[Callable[[Any], T]], functools.cached_property[Lazy[T]]]:
    """Make a property of a method that loads a value: its `Lazy` value, the same one at each use.

    Args:
        identity: the object -> the identity of its value.
    """

    def decorate(load: Callable[[Any], T]) -> functools.cached_property[Lazy[T]]:
        return functools.cached_property(lambda self: Lazy(identity(self), lambda: load(self)))

    return decorate


def identity_of(value: Any) -> Any:
    """The JSON value that identifies an input: of a dataclass, that of each field."""
    if isinstance(value, Lazy):
        return value.identity
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: identity_of(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): identity_of(v) for name, v in value.items()}
    return [identity_of(v) for v in value] if isinstance(value, (tuple, list)) else value
