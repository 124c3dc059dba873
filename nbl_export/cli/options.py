"""Options of commands: made from the options record, shared by several commands, or read by `--config FILE`.

layers = "7,9,15,25-29"          a file has the names of the options, with dashes or underscores
calibration = ["a.txt", "b.jsonl"]
depth = "0,2048"                 numbers as on the command line, or as a list

Shows a result on stdout, and progress on stderr.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nbl_export.errors import UsageError
from nbl_export.files import read_small
from nbl_export.options.option import MAIN, Option
from nbl_export.options.options import DEFAULTS, OPTIONS, PANELS, JobOptions, flag_of
from nbl_export.options.settle import over, read_asked
from nbl_export.records.from_json import read_record
from nbl_export.trust.model_settings import read_object
from nbl_export.trust.terminal import Console

if TYPE_CHECKING:
    from nbl_export.report.table import Shown, Table
    from nbl_export.run.progress import Ui

__all__ = [
    "GENERAL",
    "Config",
    "Force",
    "Json",
    "Model",
    "Output",
    "Run",
    "read_config",
    "refuse_options_before",
    "said_of",
    "show",
    "takes",
    "ui",
]

_MOST_CONFIG_BYTES = 1 << 20

GENERAL = "General"
_KEYWORD = inspect.Parameter.KEYWORD_ONLY

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory made by nbl-export --output.")]
Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Hub id, safetensors directory or GGUF.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The run directory.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Options and keys of this command from TOML; flags win.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Force = Annotated[bool, typer.Option("--force", help="Go on despite a failed verification.")]


def takes(command: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command its options from the options record, and --config FILE if it takes keys.

    The function gets the options that the user gave as a dictionary `asked`, by the field names of JobOptions.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function, eval_str=True).parameters
        known = {name: record for name, record in OPTIONS.items() if command in record.commands}
        flags = {name: record for name, record in known.items() if not record.key}
        added = [_parameter(name, record, command) for name, record in sorted(flags.items(), key=_place)]
        reads_file = len(flags) < len(known) and "config" not in own
        if reads_file:
            added.insert(0, inspect.Parameter("config", _KEYWORD, default=None, annotation=Config))

        @functools.wraps(function)
        def run(*args: Any, **given: Any) -> Any:
            chosen = {name: given.pop(name) for name in flags}
            asked = read_asked({n: v for n, v in chosen.items() if v not in (None, [])})
            if reads_file and (file := given.pop("config")) is not None:
                asked = over(_keys_for(command, known, file), asked)
            return function(*args, **given, asked=asked)

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


def _parameter(name: str, record: Option, command: str) -> inspect.Parameter:
    kind = _kind(name, record)
    low, high = (None, None) if record.numbers or kind is str else (record.least, record.most)
    metavar = record.metavar or ("N,..." if record.numbers else None if record.least is None else "N")
    hidden = command == MAIN and not record.first
    declared = typer.Option(
        flag_of(name),
        help=said_of(name, record),
        metavar=metavar,
        hidden=hidden,
        rich_help_panel=record.panel,
        min=low,
        max=high,
    )
    annotation: Any = Annotated[kind | None, declared]
    return inspect.Parameter(name, _KEYWORD, default=None, annotation=annotation)


def said_of(name: str, record: Option) -> str:
    """The help of an option, with its default if that is a number."""
    default = DEFAULTS[name]
    counted = isinstance(default, (int, float)) and not isinstance(default, bool)
    return f"{record.help.removesuffix('.')}; default {default:g}." if counted else record.help


def _kind(name: str, record: Option) -> Any:
    """The type of an option for typer; a list of numbers is text."""
    hint = typing.get_type_hints(JobOptions)[name]
    kinds = {part for part in (typing.get_args(hint) or (hint,)) if part is not type(None)}
    if record.numbers:
        return str
    return list[str] if typing.get_origin(hint) is tuple else kinds.pop()


def refuse_options_before(context: typer.Context) -> None:
    """Refuse options of the main command before a subcommand, where they have no effect."""
    for name in set(context.params) - {"verbose", "version"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"goes after {context.invoked_subcommand}, if allowed there", param_hint=flag)


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
    values = _of_run(path) if is_run else _of_toml(path)
    try:
        if is_run:
            return {}, JobOptions.from_json(values)
        found = read_asked(values)
        read_record(JobOptions, {"model": "", **found})
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    return found, None


def _of_run(path: Path) -> dict[str, Any]:
    """The recorded options, with absolute paths of model and texts."""
    manifest = read_object(path, _MOST_CONFIG_BYTES)
    options = manifest.get("options")
    places = manifest.get("places")
    if not isinstance(options, dict):
        raise UsageError(f"--config {path} is not the nbl.json of a run, because it has no options")
    places = places if isinstance(places, dict) else {}
    return {**options, **{name: places[name] for name in ("model", "calibration") if places.get(name)}}


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
