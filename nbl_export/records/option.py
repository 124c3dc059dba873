"""Everything about an option in one place: help, heading, and the commands that take the option.

The command line, docs/usage.md, `--config FILE`, nbl.json and the command that repeats a run are made from this record.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

__all__ = ["MAIN", "PANELS", "Option", "option", "options_of"]

MAIN = "main"  # the name of the main job among commands
PANELS = ("What is replaced", "Distillation", "Calibration", "Engine", "Benchmark")


@dataclass(frozen=True)
class Option:
    """One option of the command line.

    Attributes:
        help: one or two sentences.
        panel: heading in the help.
        commands: commands that take the option; an option of no command comes from a configuration file only.
        first: whether the option is on the first page of the main job's help.
        flag: without dashes, if the flag differs from the field's name.
        metavar: name of the value.
        least, most: bounds of a number.
        numbers: an example, if the value is written as numbers with commas between.
    """

    help: str
    panel: str
    commands: tuple[str, ...] = (MAIN,)
    first: bool = False
    flag: str = ""
    metavar: str | None = None
    least: float | None = None
    most: float | None = None
    numbers: str = ""


def option(default: Any, help: str, panel: str, commands: str = MAIN, **more: Any) -> Any:
    """A dataclass field with its `Option`. commands: names with spaces between."""
    said = Option(help, panel, tuple(commands.split()), **more)
    return dataclasses.field(default=default, metadata={"option": said})


def options_of(record: type) -> dict[str, Option]:
    """Field name -> option of a dataclass; fields without an option are left out."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(record) if "option" in f.metadata}
