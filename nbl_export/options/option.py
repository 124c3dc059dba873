"""What is said of an option once, beside its name, type and fixed default: help, heading, bounds, effect, usual value.

The command line, Python's arguments, docs/usage.md, `--config FILE`, nbl.json and the rules read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.plan import TAPS

__all__ = ["MAIN", "Applies", "ModelFacts", "Option", "Usual", "option"]

MAIN = "main"  # the name of the main job among commands


@dataclass(frozen=True)
class ModelFacts:
    """What options depend on in a model. A default means that the fact is unknown, or that the model is without it.

    Attributes:
        maps_tap: the tap of the maps, if the model is an NBL checkpoint.
        kinds: of the mixers of an NBL checkpoint.
        architecture, taps: name, and possible taps.
        not_from, no_exit: decoder source -> why it exports no such graph, and why such a graph takes no exit layer;
            a destination of that name takes none either.
        decoder: the decoder's sizes.
        fits: whether the whole model fits into this machine's memory in float32.
    """

    maps_tap: str = ""
    kinds: frozenset[str] = frozenset()
    architecture: str = ""
    taps: tuple[str, ...] = TAPS
    not_from: Mapping[str, str] = field(default_factory=dict)
    no_exit: Mapping[str, str] = field(default_factory=dict)
    decoder: DecoderSpec | None = None
    fits: bool = True


# The value if nobody asks for one, from the other options, the engine and the model. Without an engine, as when a
# command is written: "" if engine or model decide.
Usual = Callable[[Mapping[str, Any], Capabilities | None, ModelFacts], Any]


@dataclass(frozen=True)
class Applies:
    """When an option has an effect.

    Attributes:
        belongs: ends the sentence "--option is for ...".
        holds: of a `rules.Case`.
    """

    belongs: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """One option of the command line.

    Attributes:
        help: one or two sentences.
        panel: heading in the help.
        commands: commands that take the option.
        key: whether it is a key of `--config FILE` and no flag.
        first: whether the option is on the first page of the main job's help.
        flag: without dashes, if the flag differs from the field's name.
        metavar: name of the value; by default N for a number, and N,... for several.
        least, most: bounds of a number.
        numbers: an example, if the value is written as numbers with commas between.
        choices: the possible values; empty if there is no list of them.
        python: what Python takes beside the field's own type: "int" or "float" instead of their text, "share" for a
            share below 1 instead of a percentage, "layers" for a list of layers, "list" for one text instead of a list.
        applies: all of these hold if the option has an effect; without any, it always has.
        usual: its default, if it depends on other options, on the engine or on the model.
    """

    help: str
    panel: str
    commands: tuple[str, ...] = (MAIN,)
    key: bool = False
    first: bool = False
    flag: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    numbers: str = ""
    choices: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    applies: tuple[Applies, ...] = ()
    usual: Usual | None = None


def option(default: Any, help: str, panel: str, commands: str = MAIN, *, python: str = "", **more: Any) -> Any:
    """A dataclass field with its `Option`. commands, python: names with spaces between."""
    record = Option(help, panel, tuple(commands.split()), python=tuple(python.split()), **more)
    return dataclasses.field(default=default, metadata={"option": record})
