"""Help under headings; --help shows the first page of the main command, and --help-all shows everything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from nbl_export.cli.options import GENERAL
from nbl_export.errors import UsageError

__all__ = ["Command", "Group", "record_of", "show_all"]

_COMPLETION = ("install_completion", "show_completion")


class Command(TyperCommand):
    """A command with its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options."""
        _write(self, ctx, formatter)


class Group(TyperGroup):
    """The main command and its subcommands."""

    everything = False

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and the subcommands."""
        _write(self, ctx, formatter, () if self.everything else _COMPLETION)
        self.format_commands(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The subcommand.

        Raises:
            UsageError: the word is a place, so a model was meant.
        """
        word = args[0]
        if self.get_command(ctx, word) is None and ("/" in word or Path(word).exists()):
            raise UsageError(f"{word} is no command; give the model with --model {word}")
        return super().resolve_command(ctx, args)


def record_of(parameter: Any, ctx: Any) -> tuple[str, str] | None:
    """Name and help of an option or argument, without the Python type that typer adds; None if it is hidden."""
    record = parameter.get_help_record(ctx)
    return record and (re.sub(r" <\S+>$", "", record[0]), record[1])


def _write(command: Any, ctx: Any, formatter: Any, without: tuple[str, ...] = ()) -> None:
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = None if parameter.name in without else record_of(parameter, ctx)
        if record is not None:
            argument = parameter.param_type_name == "argument"
            panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if argument else GENERAL)
            panels.setdefault(panel, []).append(record)
    for panel in sorted(panels, key=lambda name: (name != "Arguments", name != GENERAL)):
        with formatter.section(panel):
            formatter.write_dl(panels[panel])


def show_all(ctx: typer.Context, asked: bool) -> None:
    """Callback of --help-all: show every option and every subcommand."""
    if not asked or ctx.resilient_parsing:
        return
    command: Any = ctx.command
    command.everything = True
    for hidden in (*command.params, *command.commands.values()):
        hidden.hidden = False
    typer.echo(ctx.get_help())
    raise typer.Exit
