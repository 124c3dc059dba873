"""The command line: flags -> options -> the run.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 an error that the user can correct,
2 usage, 3 verification or a check of `accept` failed, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export import __version__
from nbl_export.cli import measuring, results, stages
from nbl_export.cli import options as opt
from nbl_export.cli.exit import GOES_ON, INTERRUPTED, Interrupts, explain, fail
from nbl_export.cli.help import Command, Group, show_all
from nbl_export.cli.show import ui
from nbl_export.errors import UsageError
from nbl_export.options.options import JobOptions
from nbl_export.options.settle import over
from nbl_export.trust.terminal import Formatter

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Group,
    name="nbl-export",
    help="Replace attention layers of a decoder LLM by linear layers; verify, measure.",
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
        str | None, typer.Option(metavar="MODEL", help="Hub id, safetensors directory, GGUF or ONNX graph.")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Options from TOML or from a run's nbl.json; flags win.")
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
        missing = "--model" if "model" not in given and recorded is None else "--output"
        raise UsageError(f"the main job needs {missing}; see nbl-export --help")
    _main_job(given, recorded, output, force)


def _log(verbose: bool) -> None:
    """Send the libraries' log to standard error."""
    level = logging.DEBUG if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _main_job(asked: dict[str, Any], recorded: JobOptions | None, output: Path, force: bool) -> None:
    """Run all stages; `asked` has the field names of JobOptions."""
    from nbl_export.run.pipeline import run_job
    from nbl_export.run_directory import REPORT_HTML

    if run_job(asked, output, ui(), force=force, recorded=recorded) is not None:
        print(output / REPORT_HTML)


for _name, _command, _hidden in (*stages.COMMANDS, *measuring.COMMANDS, *results.COMMANDS):
    app.command(_name, cls=Command, hidden=_hidden)(_command)


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
