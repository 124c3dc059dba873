"""The command line: flags -> options -> the run.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 an error that the user can correct,
2 usage, 3 verification or a check of `accept` failed, 130 interrupted. A command that failed writes one line to stderr.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from nbl_export.cli import options as opt
from nbl_export.cli.commands import COMMANDS, FOR_DEVELOPERS
from nbl_export.cli.options import GENERAL, ui
from nbl_export.errors import NblError, UsageError
from nbl_export.model import processes
from nbl_export.options.options import OPTIONS
from nbl_export.options.settle import over
from nbl_export.trust.terminal import Formatter, visible
from nbl_export.version import __version__

__all__ = [
    "GOES_ON",
    "INTERRUPTED",
    "Command",
    "Group",
    "Interrupts",
    "app",
    "explain",
    "fail",
    "main",
    "record_of",
    "show_all",
]

_COMPLETION = ("install_completion", "show_completion")
INTERRUPTED = 130
_SHARED = (None, "calibrate", "plan")  # commands that several processes share; None: the main job
_LONGEST = 1000  # characters of an error
_RANK_0_SECONDS = 5.0  # for rank 0 to say an error first
KEYS = tuple(name for name, record in OPTIONS.items() if record.key)  # which `--config FILE` takes
GOES_ON = "interrupted; finished stages are kept, and the same command continues after them"


# -- help under headings ---------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A command with its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(self, ctx, formatter)


class Group(TyperGroup):
    """The main command and its subcommands."""

    everything = False

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(self, ctx, formatter, () if self.everything else _COMPLETION)
        if self.everything:
            with formatter.section("Keys of --config FILE"):
                formatter.write_dl([(name, opt.said_of(name, OPTIONS[name])) for name in KEYS])
        self.format_commands(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and ("/" in word or Path(word).exists()):  # a model was meant
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


app = typer.Typer(
    cls=Group,
    name="nbl-export",
    help="Shorten the time to the first token of a language model: predict keys or replace attention; verify, measure.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
@opt.takes("main")
def root(
    context_: typer.Context,
    asked: dict[str, Any],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Hub id, safetensors directory or GGUF.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="The run directory.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Options and keys from TOML, or a run's nbl.json; flags win.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Start over: remove the run in DIR first.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the libraries say.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=show_all, help="Every option and command.")
    ] = False,
) -> None:
    """Make a verified and measured NBL decoder from a checkpoint. Subcommands run single stages."""
    _log(verbose)
    if version:
        print(__version__)
        return
    if context_.invoked_subcommand not in _SHARED:
        processes.alone()
    if context_.invoked_subcommand is not None:
        opt.refuse_options_before(context_)
        return
    given = {**asked, **({"model": model} if model else {})}
    if not given and (output, config, force) == (None, None, False):
        sys.stderr.write(f"{context_.get_help()}\n")
        raise typer.Exit(2)
    written, recorded = ({}, None) if config is None else opt.read_config(config)
    given = over(written, given)
    if output is None or ("model" not in given and recorded is None):
        lacks = [("--model", "model" not in given and recorded is None), ("--output", output is None)]
        missing = " and ".join(flag for flag, is_missing in lacks if is_missing)
        raise UsageError(f"the main job needs {missing}; see nbl-export --help")
    from nbl_export.run.pipeline import run_job
    from nbl_export.run_directory import REPORT_HTML

    print(run_job(given, output, ui(), force=force, recorded=recorded) / REPORT_HTML)


def _log(verbose: bool) -> None:
    """Send the libraries' log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, handlers=[handler])


for _name, _command in COMMANDS.items():
    app.command(_name, cls=Command, hidden=_name in FOR_DEVELOPERS)(_command)


def main() -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # only nbl-export shows progress
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # users cannot act on deprecations inside libraries
    interrupts = Interrupts()
    try:
        status = app(prog_name="nbl-export", standalone_mode=False)
        if status == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        fail(GOES_ON, INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if interrupts.seen:
            fail(GOES_ON, INTERRUPTED)
        explain(error)


# -- how a command ends ----------------------------------------------------------------------------------------


class Interrupts:
    """Turns signals into KeyboardInterrupt, and remembers them in `seen`.

    A library can turn the interrupt into another error. If the import of an extension module is interrupted, Python
    raises ImportError, and the module seems not to be installed.
    """

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # keep an ignored SIGINT ignored
            signal.signal(signal.SIGINT, self._raise)

    def _raise(self, _signal: int, _frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def explain(error: Exception) -> NoReturn:
    """Exit with one line for an error that the user can correct; raise any other error, which is a defect."""
    logging.getLogger(__name__).debug("where it happened", exc_info=error)
    usage = getattr(error, "format_message", None)
    flag = str(getattr(error, "option_name", ""))
    name = flag.lstrip("-").replace("-", "_")
    if name in KEYS and "o such option" in str(usage and usage()):
        fail(f"{flag} is a key of a file: write {name} = ... to FILE.toml, and give --config FILE.toml", 2)
    if isinstance(error, NblError):
        fail(str(error), error.exit_code)
    if usage is not None:
        context = getattr(error, "ctx", None)  # of the subcommand that was called wrongly
        command = "nbl-export" if context is None else context.command_path
        fail(f"{usage().rstrip('.')}; see {command} --help", int(getattr(error, "exit_code", 2)))
    # torch has its own text; CPython raises SystemError if memory runs out in a call into C
    if isinstance(error, (MemoryError, SystemError)) or "can't allocate memory" in str(error):
        fail("out of memory; use a smaller key context, or a machine with more memory", 1)
    if isinstance(error, OSError) and error.strerror:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    if isinstance(error, ValueError):
        fail(str(error), 1)
    raise error


def fail(message: str, status: int) -> NoReturn:
    said = visible(" ".join(message.partition("Exception raised from ")[0].split()))  # torch's C++ stack follows
    if len(said) > _LONGEST:  # for example a very long file name; the beginning and the advice at the end stay
        said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    if rank := processes.rank():  # rank 0 says what all have seen, and torchrun then ends this process
        time.sleep(_RANK_0_SECONDS)
        said = f"rank {rank}: {said}"
    elif processes.count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, since another process has ended
    sys.stderr.write(f"nbl-export: {said}\n")
    sys.exit(status)
