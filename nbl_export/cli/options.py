"""Commands and their options: made from the options record, shared by several commands, or read by `--config FILE`.

layers = "7,9,15,25-29"          a file has the names of the options, with dashes or underscores
calibration = ["a.txt", "b.jsonl"]
depth = "0,2048"                 numbers as on the command line, or as a list

Shows a result on stdout, and progress on stderr.
"""

from __future__ import annotations

import functools
import json
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nbl_export.errors import UsageError
from nbl_export.files import read_small
from nbl_export.options.option import MAIN, Option
from nbl_export.options.options import DEFAULTS, OPTIONS, PANELS, JobOptions, flag_of
from nbl_export.options.public import located
from nbl_export.options.settle import merge_options, read_asked
from nbl_export.records.from_json import check_shape, read_record
from nbl_export.records.shapes import MANIFEST
from nbl_export.trust.model_settings import read_object
from nbl_export.trust.terminal import Console

if TYPE_CHECKING:
    from nbl_export.report.table import Shown, Table
    from nbl_export.run.progress import Ui

__all__ = [
    "FORCE",
    "JSON",
    "MODEL",
    "OUTPUT",
    "PATH",
    "RUN",
    "Command",
    "asked_in",
    "command",
    "describe_option",
    "job_options",
    "panel_of",
    "read_config",
    "refuse_options_before",
    "show",
    "ui",
]

_MOST_CONFIG_BYTES = 1 << 20
_PLACES = {"places?": MANIFEST["places?"], "quantized?": MANIFEST["quantized?"]}  # of a run's nbl.json
_ARGUMENTS = "Arguments"
_GENERAL = "General"
_RANGES: dict[type, Any] = {int: click.IntRange, float: click.FloatRange}

PATH = click.Path(path_type=Path)
RUN = click.Argument(["directory"], type=PATH, metavar="DIR", help="A run directory made by nbl-export --output.")
MODEL = functools.partial(
    click.Option, ["--model", "-m"], metavar="MODEL", help="Hub id, safetensors directory or GGUF."
)
OUTPUT = functools.partial(click.Option, ["--output", "-o"], type=PATH, metavar="DIR", help="The run directory.")
FORCE = click.Option(["--force"], is_flag=True, help="Go on despite a failed verification.")
JSON = click.Option(["as_json", "--json"], is_flag=True, help="Machine-readable output on stdout.")
_CONFIG = click.Option(
    ["--config"], type=PATH, metavar="FILE", help="Options and keys of this command from TOML; flags win."
)


# -- help under headings ---------------------------------------------------------------------------------------


class Command(click.Command):
    """A command whose help has options under headings."""

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Leave arguments to `format_options`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        panels: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: [], _GENERAL: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                panels.setdefault(panel_of(parameter), []).append(record)
        for panel, records in panels.items():
            if records:
                with formatter.section(panel):
                    formatter.write_dl(records)


class _JobOption(click.Option):
    """An option of the options record."""


def panel_of(parameter: click.Parameter) -> str:
    """The heading of an option or argument."""
    if isinstance(parameter, click.Argument):
        return _ARGUMENTS
    return OPTIONS[parameter.name].panel if isinstance(parameter, _JobOption) else _GENERAL


# -- commands --------------------------------------------------------------------------------------------------


def command(
    name: str, *own: click.Parameter, takes: str = "", hidden: bool = False
) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, with the function's docstring as help.

    Args:
        own: parameters beside those of the options record.
        takes: the command whose options of the record are added, with --config FILE if some of them are keys. The
            function gets the options that the user gave as a dictionary `asked`, by the field names of JobOptions.
        hidden: whether the command is for developers, and left out of the first page of help.
    """
    known = {option: record for option, record in OPTIONS.items() if takes in record.commands}
    reads_file = any(record.key for record in known.values())
    params = [*own, *([_CONFIG] if reads_file else []), *job_options(takes)]

    def decorate(function: Callable[..., Any]) -> Command:
        def run(**given: Any) -> None:
            if takes:
                asked = asked_in(given)
                file = given.pop("config", None)
                given["asked"] = asked if file is None else merge_options(_keys_for(takes, known, file), asked)
            function(**given)

        return Command(name, params=params, callback=run, help=function.__doc__, hidden=hidden)

    return decorate


def job_options(command: str) -> list[click.Option]:
    """The options of the record that a command takes, in the order of their headings."""
    taken = [(name, record) for name, record in OPTIONS.items() if command in record.commands and not record.key]
    taken.sort(key=lambda item: PANELS.index(item[1].panel))
    return [_job_option(name, record, command) for name, record in taken]


def _job_option(name: str, record: Option, command: str) -> click.Option:
    hint = typing.get_type_hints(JobOptions)[name]
    kind: Any = next((number for number in (int, float) if number in (hint, *typing.get_args(hint))), str)
    if record.numbers:
        kind = str
    elif record.least is not None:
        kind = _RANGES[kind](record.least, record.most)
    return _JobOption(
        [name, flag_of(name)],
        type=kind,
        multiple=typing.get_origin(hint) is tuple and not record.numbers,
        help=describe_option(name, record),
        metavar=record.metavar or ("N,..." if record.numbers else None if record.least is None else "N"),
        hidden=command == MAIN and not record.first,
    )


def describe_option(name: str, record: Option) -> str:
    """The help of an option, with its default if that is a number."""
    default = DEFAULTS[name]
    counted = isinstance(default, (int, float)) and not isinstance(default, bool)
    return f"{record.help.removesuffix('.')}; default {default:g}." if counted else record.help


def asked_in(given: dict[str, Any]) -> dict[str, Any]:
    """Take the options of the record that the user gave out of the values of a command.

    Raises:
        UsageError: a text holds no numbers.
    """
    taken = {name: given.pop(name) for name in OPTIONS if name in given}
    return read_asked({name: value for name, value in taken.items() if value not in (None, ())})


def refuse_options_before(context: click.Context) -> None:
    """Refuse options of the main command before a subcommand, where they have no effect."""
    for name in set(context.params) - {"verbose", "version"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise click.BadParameter(f"goes after {context.invoked_subcommand}, if allowed there", param_hint=flag)


def _keys_for(command: str, known: Mapping[str, Option], path: Path) -> dict[str, Any]:
    """The options in a TOML file, which all belong to a command.

    Raises:
        UsageError: as `read_config`, or an option is for other commands.
    """
    if path.suffix == ".json":
        raise UsageError(f"--config {path}: the main job alone takes the options of a run; give a TOML file")
    found, _ = read_config(path)
    if command == MAIN:
        found.pop("model", None)  # `estimate` names it
    if other := found.keys() - known.keys():
        raise UsageError(f"{path}: {min(other)} is no option of {'estimate' if command == MAIN else command}")
    return found


def read_config(path: Path) -> tuple[dict[str, Any], JobOptions | None]:
    """The options that a TOML file asks for, by the field names of JobOptions; or none, and the options of a run.

    Raises:
        UsageError: the file cannot be read, or has an unknown option or a wrong value.
    """
    if not path.exists():
        raise UsageError(f"--config {path} cannot be read: there is no such file")
    is_run = path.suffix == ".json"
    values = read_object(path, _MOST_CONFIG_BYTES) if is_run else _of_toml(path)
    if is_run and not isinstance(values.get("options"), dict):
        raise UsageError(f"--config {path} is not the nbl.json of a run, because it has no options")
    try:
        if is_run:
            check_shape(values, _PLACES)
            return {}, located(JobOptions.from_json(values["options"]), values)
        found = read_asked(values)
        read_record(JobOptions, {"model": "", **found})
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    return found, None


def _of_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(read_small(path, _MOST_CONFIG_BYTES).decode("utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} cannot be read as TOML: {error}") from error


# -- results on stdout, progress on stderr ---------------------------------------------------------------------


def show(value: Any, table: Table | Shown, as_json: bool) -> None:
    """Write a result to stdout, as JSON or as tables."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        shown = table if isinstance(table, tuple) else (table,)
        Console(width=None if sys.stdout.isatty() else 140).print(*shown, sep="\n")


def ui(quiet: bool = False) -> Ui:
    """The progress display of a run."""
    from nbl_export.run.progress import Ui

    return Ui(quiet=quiet)
