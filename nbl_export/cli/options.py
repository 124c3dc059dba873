"""Options of commands: the options record, and options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export.records.asked import numbers
from nbl_export.records.option import (
    MAIN,
    PANELS,
    Option,
    options_of,
)
from nbl_export.records.options import JobOptions

__all__ = ["GENERAL", "Force", "Json", "Model", "Output", "Run", "TrustEngine", "refuse_options_before", "takes"]

GENERAL = "General"

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory made by nbl-export --output.")]
Model = Annotated[str, typer.Option(metavar="MODEL", help="Hub id, safetensors directory, GGUF or ONNX graph.")]
Output = Annotated[Path, typer.Option(metavar="DIR", help="The run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Go on despite a failed verification.")]
TrustEngine = Annotated[
    bool,
    typer.Option("--trust-engine", help="Run engine files, which are code, that you did not build here. Remembered."),
]


def takes(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command its options from the options record.

    The function gets the options that the user gave as a dictionary `asked`, by the field names of JobOptions.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True).parameters
        asked = {name: said for name, said in options_of(JobOptions).items() if command in said.commands}
        added = [_parameter(name, said, command) for name, said in sorted(asked.items(), key=_place)]

        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            chosen = {name: given.pop(name) for name in asked}
            return function(*args, **given, asked=_values(chosen))

        kept = [parameter for name, parameter in own.items() if name != "asked"]
        signature = inspect.Signature([*kept, *added])
        # typer reads these two attributes
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del run.__wrapped__
        return run

    return decorate


def _place(item: tuple[str, Option]) -> int:
    return PANELS.index(item[1].panel)


def _parameter(name: str, said: Option, command: str) -> inspect.Parameter:
    kind = _kind(name, said)
    low, high = (None, None) if said.numbers or kind is str else (said.least, said.most)
    flag = f"--{(said.flag or name).replace('_', '-')}"
    hidden = command == MAIN and not said.first
    default = next(f.default for f in dataclasses.fields(JobOptions) if f.name == name)
    counted = isinstance(default, (int, float)) and not isinstance(default, bool)
    text = f"{said.help.removesuffix('.')}; default {default:g}." if counted else said.help
    declared = typer.Option(
        flag, help=text, metavar=said.metavar, hidden=hidden, rich_help_panel=said.panel, min=low, max=high
    )
    annotation: Any = Annotated[kind | None, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(name: str, said: Option) -> Any:
    """The type of an option for typer; a list of numbers is text."""
    hint = typing.get_type_hints(JobOptions)[name]
    kinds = {part for part in (typing.get_args(hint) or (hint,)) if part is not type(None)}
    if said.numbers:
        return str
    return list[str] if typing.get_origin(hint) is tuple else kinds.pop()


def _values(given: dict[str, Any]) -> dict[str, Any]:
    """Values in the types of JobOptions, without the options that were not given."""
    said = options_of(JobOptions)
    chosen = {name: value for name, value in given.items() if value not in (None, [])}
    for name, value in chosen.items():
        if said[name].numbers:
            chosen[name] = numbers(value, said[name], name)
        elif isinstance(value, list):
            chosen[name] = tuple(value)
    return chosen


def refuse_options_before(context: typer.Context) -> None:
    """Refuse options of the main command before a subcommand, where they have no effect."""
    for name in set(context.params) - {"verbose", "version"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"goes after {context.invoked_subcommand}, if allowed there", param_hint=flag)
