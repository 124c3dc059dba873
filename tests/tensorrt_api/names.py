"""names.json as values: what each binding of TensorRT offers under a name."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from .read_names import BINDINGS, NAMES_FILE

__all__ = ["ALL", "RTX_ONLY", "TRT_ONLY", "Member", "class_of", "has_name", "member", "members_of"]

ALL = "".join(BINDINGS)
RTX_ONLY, TRT_ONLY = "r", ALL.replace("r", "")
_CALL = re.compile(r"\((.*?)\) -> ([\w\[\], ]+?)(?= else | \||$)")


@dataclass(frozen=True)
class Member:
    """A member of a class.

    Attributes:
        counts: least and most arguments of each overload; empty if it cannot be called.
        gives: class of the result or of the property.
        failure: what a failed call gives: "False", "None", "raises X"; "" if it was not tried.
        readable, settable: of a property; a value is readable.
    """

    counts: tuple[tuple[int, int], ...]
    gives: str
    failure: str
    readable: bool = True
    settable: bool = False

    def takes(self, arguments: int) -> bool:
        """Whether an overload takes so many arguments."""
        return any(least <= arguments <= most for least, most in self.counts)


@functools.cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(NAMES_FILE.read_text(encoding="utf-8"))
    assert content["bindings"] == BINDINGS
    return content


def class_of(gives: str) -> str:
    """The class in names.json that a result belongs to; "" if it is no object of the library."""
    if gives in _content()["classes"]:
        return gives
    if gives == "IParserError":  # the bindings name the class before they register it
        return "ParserError"
    return "ILayer" if gives.endswith("Layer") else ""


def has_name(name: str, letters: str) -> bool:
    """Whether the modules of all these bindings have a name."""
    return all(any(b in had and name in listed.split() for had, listed in _content()["names"].items()) for b in letters)


def member(cls: str, name: str, letters: str) -> Member | None:
    """The member as the last of these bindings has it; None if one of them lacks it."""
    texts = [_text(cls, name, letter) for letter in letters]
    return None if None in texts else _member(texts[-1])


def members_of(cls: str, letters: str) -> set[str]:
    """Public members of a class that all these bindings have."""
    listed = _content()["classes"].get(cls, {})
    return {name for name in listed if name != "__init__" and all(_text(cls, name, letter) for letter in letters)}


def _text(cls: str, name: str, letter: str) -> str | None:
    had = _content()["classes"].get(cls, {}).get(name, {})
    return next((text for letters, text in had.items() if letter in letters), None)


def _member(text: str | None) -> Member:
    assert text is not None
    if text == "value":
        return Member((), "", "")
    if text.startswith("property "):
        kind = text.removeprefix("property ").removesuffix(" settable")
        written_only = kind == "write-only"
        return Member((), kind, "", not written_only, written_only or text.endswith(" settable"))
    signatures, _, failure = text.partition(" else ")
    calls = _CALL.findall(signatures)
    return Member(tuple(_counts(arguments) for arguments, _ in calls), calls[0][1], failure)


def _counts(arguments: str) -> tuple[int, int]:
    names = [name for name in arguments.split(", ") if name]
    return sum(not name.endswith("=") for name in names), len(names)
