"""Holds a stand-in for TensorRT to names.json: it has what the library has, and answers what the library answers."""

from __future__ import annotations

from typing import Any

from .names import Member, class_of, has_name, member, members_of
from .uses import MODULE

__all__ = ["Held", "Impossible", "held"]

_BASES = ("ILogger", "IProgressMonitor", "IStreamWriter")  # classes that the package derives from


class Impossible(BaseException):
    """What the library never does. Code that catches the library's errors lets it through: it is no Exception."""


def held(module: Any, letters: str) -> Any:
    """A stand-in of the module, seen through the names of these bindings."""
    return Held(module, MODULE, letters)


class Held:
    """An object of a stand-in as an object of the library's class.

    Raises:
        AttributeError: the library has no such member, or does not let it be set; as the library itself.
        Impossible: the stand-in lacks a member or gives what the library does not give.
    """

    def __init__(self, thing: Any, cls: str, letters: str) -> None:
        for name, value in (("_thing", thing), ("_cls", cls), ("_letters", letters)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            return getattr(self._thing, name)
        if self._cls == MODULE:
            return self._from_module(name)
        found = self._member(name)
        if not found.readable:
            raise AttributeError(f"{self._cls}.{name} can only be set")
        _demand(hasattr(self._thing, name), f"the stand-in has no {self._cls}.{name}")
        value = getattr(self._thing, name)
        return self._method(name, found, value) if found.counts else self._wrapped(value, found)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._member(name).settable:
            raise AttributeError(f"{self._cls}.{name} cannot be set")
        setattr(self._thing, name, _bare(value))

    def __call__(self, *arguments: Any) -> Any:
        """Make an object of the class."""
        found = member(self._cls, "__init__", self._letters)
        if found is None:
            raise TypeError(f"{self._cls}: No constructor defined!")
        made = self._called("__init__", found, self._thing, arguments)
        _demand(made is not None, f"{self._cls}() never gives None")
        return Held(made, self._cls, self._letters)

    def _member(self, name: str) -> Member:
        found = member(self._cls, name, self._letters)
        if found is None:
            raise AttributeError(f"the library has no {self._cls}.{name}")
        return found

    def _from_module(self, name: str) -> Any:
        if not has_name(name, self._letters):
            raise AttributeError(f"the library has no {name}")
        _demand(hasattr(self._thing, name), f"the stand-in has no {name}")
        value = getattr(self._thing, name)
        if name not in _BASES:
            return Held(value, name, self._letters) if class_of(name) == name else value
        extra = {n for n in vars(value) if not n.startswith("_")} - members_of(name, self._letters)
        _demand(not extra, f"the library has no {name}.{extra}")
        return value

    def _method(self, name: str, found: Member, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = self._called(name, found, function, arguments)
            where = f"{self._cls}.{name}"
            if result is None:
                _demand("None" in (found.gives, found.failure), f"{where} never gives None, it {found.failure}")
            if result is False:
                _demand(found.gives == "bool" and found.failure in ("", "False"), f"{where} gives no False")
            return self._wrapped(result, found)

        return call

    def _called(self, name: str, found: Member, function: Any, arguments: tuple[Any, ...]) -> Any:
        if not found.takes(len(arguments)):
            raise TypeError(f"{self._cls}.{name} does not take {len(arguments)} arguments")
        try:
            return function(*map(_bare, arguments))
        except Exception as error:
            kind = type(error).__name__
            if found.failure != f"raises {kind}":
                raise Impossible(f"{self._cls}.{name} never raises {kind}: {error}") from error
            raise

    def _wrapped(self, value: Any, found: Member) -> Any:
        cls = class_of(found.gives)
        plain = value is None or isinstance(value, bytes | int | str)
        return Held(value, cls, self._letters) if cls and not plain else value


def _demand(fact: bool, otherwise: str) -> None:
    if not fact:
        raise Impossible(otherwise)


def _bare(value: Any) -> Any:
    return value._thing if isinstance(value, Held) else value
