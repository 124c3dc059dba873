"""The command line: flags -> options -> the run.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 an error that the user can correct,
2 usage, 3 verification or a check of `accept` failed, 130 interrupted. A command that failed writes one line to stderr.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import shell_complete

from nbl_export.cli import options as opt
from nbl_export.cli.commands import COMMANDS
from nbl_export.cli.options import ui
from nbl_export.errors import NblError, UsageError
from nbl_export.model import processes
from nbl_export.options.option import MAIN
from nbl_export.options.options import OPTIONS, renamed
from nbl_export.options.settle import merge_options
from nbl_export.trust.terminal import Formatter, visible
from nbl_export.version import __version__

__all__ = ["GOES_ON", "INTERRUPTED", "KEYS", "Group", "Interrupts", "app", "explain", "fail", "main"]

INTERRUPTED = 130
_NAME = "nbl-export"
_COMPLETE = "_NBL_EXPORT_COMPLETE"  # the variable by which a shell asks for completions
_SHARED = (None, "calibrate", "plan")  # commands that several processes share; None: the main job
_LONGEST = 1000  # characters of an error
_RANK_0_SECONDS = 5.0  # for rank 0 to say an error first
KEYS = tuple(name for name, record in OPTIONS.items() if record.key)  # which `--config FILE` takes
GOES_ON = "interrupted; finished stages are kept, and the same command continues after them"


class Group(opt.Command, click.Group):
    """The main command and its subcommands."""

    shows_keys = False

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        if self.shows_keys:
            with formatter.section("Keys of --config FILE"):
                formatter.write_dl([(name, opt.describe_option(name, OPTIONS[name])) for name in KEYS])
        self.format_commands(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        word = args[0]
        if word == "serve":
            raise UsageError(
                "serve is no command: nbl-export convert DIR lists the programs that serve a run, and docs/serving.md "
                "says how"
            )
        if self.get_command(ctx, word) is None and ("/" in word or Path(word).exists()):  # a model was meant
            raise UsageError(f"{word} is no command; give the model with --model {word}")
        return super().resolve_command(ctx, args)


def _show_all(ctx: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    """Show every option and every subcommand."""
    if not asked or ctx.resilient_parsing:
        return
    everything = copy.deepcopy(app)
    everything.shows_keys = True
    hidden: list[Any] = [*everything.params, *everything.commands.values()]
    for one in hidden:
        one.hidden = False
    click.echo(everything.get_help(ctx))
    ctx.exit()


def _show_completion(ctx: click.Context, _parameter: click.Parameter, shell: str | None) -> None:
    """Print what a shell's start-up file runs."""
    if shell and not ctx.resilient_parsing:
        ctx.exit(shell_complete(app, {}, _NAME, _COMPLETE, f"{shell}_source"))


@click.pass_context
def _root(
    context: click.Context,
    model: str | None,
    output: Path | None,
    config: Path | None,
    force: bool,
    verbose: bool,
    version: bool,
    **flags: Any,
) -> None:
    """Run the main job, or prepare a subcommand."""
    _log(verbose)
    if version:
        print(__version__)
        return
    if context.invoked_subcommand not in _SHARED:
        if rank := processes.rank():
            sys.stderr.write(f"{_NAME}: rank {rank} leaves this command to rank 0; unset RANK to run it here\n")
        processes.detach()
    if context.invoked_subcommand is not None:
        opt.refuse_options_before(context)
        return
    given = {**opt.asked_in(flags), **({"model": model} if model else {})}
    if not given and (output, config, force) == (None, None, False):
        sys.stderr.write(f"{context.get_help()}\n")
        context.exit(2)
    written, recorded = ({}, None) if config is None else opt.read_config(config)
    given = merge_options(written, given)
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


app = Group(
    _NAME,
    COMMANDS,
    callback=_root,
    invoke_without_command=True,
    help=(
        "Shorten the time to first token (TTFT) of a language model: predict KV or replace attention; verify, measure."
        f"\n\n{_NAME} --model MODEL --output DIR"
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[
        opt.MODEL(),
        opt.OUTPUT(),
        click.Option(
            ["--config"],
            type=opt.PATH,
            metavar="FILE",
            help="Options and keys from TOML, or a run's nbl.json; flags win.",
        ),
        click.Option(["--force"], is_flag=True, help="Start over: remove the run in DIR first."),
        click.Option(["--verbose", "-v"], is_flag=True, help="Log what the libraries say."),
        click.Option(["--version"], is_flag=True, help="Print the version."),
        click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            help="Every option and command.",
        ),
        click.Option(
            ["--show-completion"],
            type=click.Choice(["bash", "zsh", "fish"]),
            metavar="SHELL",
            is_eager=True,
            expose_value=False,
            hidden=True,
            callback=_show_completion,
            help="Print the completion of bash, zsh or fish, for the shell's start-up file.",
        ),
        *opt.job_options(MAIN),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # only nbl-export shows progress
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # users cannot act on deprecations inside libraries
    if instruction := os.environ.get(_COMPLETE):
        sys.exit(shell_complete(app, {}, _NAME, _COMPLETE, instruction))
    interrupts = Interrupts()
    try:
        with app.make_context(_NAME, sys.argv[1:]) as context:  # click's own main writes an empty line if interrupted
            app.invoke(context)
        sys.exit(0)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except KeyboardInterrupt:
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
    if isinstance(error, click.NoSuchOption):
        flag = error.option_name
        name = flag.lstrip("-").replace("-", "_")
        if sentence := renamed(flag):
            fail(sentence, 2)
        if name in KEYS:
            fail(f"{flag} is a key of a file: write {name} = ... to FILE.toml, and give --config FILE.toml", 2)
    if isinstance(error, NblError):
        fail(str(error), error.exit_code)
    if isinstance(error, click.UsageError):
        page = _NAME if error.ctx is None else error.ctx.command_path  # of the subcommand that was called wrongly
        fail(f"{error.format_message().rstrip('.')}; see {page} --help", error.exit_code)
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
