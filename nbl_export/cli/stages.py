"""Commands that run single stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export.cli import options as opt
from nbl_export.cli.show import show, ui

__all__ = ["COMMANDS"]


@opt.takes("calibrate")
def calibrate(
    model: opt.Model,
    output: opt.Output,
    asked: dict[str, Any],
    force: Annotated[bool, typer.Option("--force", help="Start over: remove the run in DIR first.")] = False,
) -> None:
    """Collect the moments of every layer from calibration text."""
    from nbl_export.run.pipeline import run_calibration
    from nbl_export.run_directory import MOMENTS_FILE

    if run_calibration(model, asked, output, ui(), force=force) is not None:
        print(output / MOMENTS_FILE)


@opt.takes("plan")
def plan(
    directory: opt.Run,
    asked: dict[str, Any],
    sweep: Annotated[bool, typer.Option("--sweep", help="Quality and modelled speed of 0, 1, ... layers.")] = False,
    max_layers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Most layers of a sweep; default: half of the layers.")
    ] = None,
    as_json: opt.Json = False,
) -> None:
    """Score layers, choose which to replace, fit their maps.

    --sweep shows quality against modelled speed for every number of layers.
    """
    from nbl_export.report.console import scores_table, sweep_table
    from nbl_export.run.pipeline import run_stages, run_sweep
    from nbl_export.run_directory import SWEEP_FILE

    if sweep:
        found = run_sweep(directory, ui(as_json), asked, max_layers).read_json(SWEEP_FILE)
        return show(found, sweep_table(found), as_json)
    if max_layers is not None:
        raise typer.BadParameter("needs --sweep", param_hint="--max-layers")
    run = run_stages(directory, "plan", ui(as_json), changes=asked)
    shown = ("num_layers", "replaced_layers", "tap", "select", "fit", "ranks", "goal", "curve", "scores")
    facts = {k: run.manifest[k] for k in shown}
    return show(facts, scores_table(run.manifest), as_json)


@opt.takes("rewrite")
def rewrite(directory: opt.Run, asked: dict[str, Any]) -> None:
    """Write the decoder graph of a run and its NBL version."""
    from nbl_export.run.pipeline import run_stages

    run_stages(directory, "rewrite", ui(), changes=asked)
    print(directory / "model")


def rewrite_graph(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="An ONNX decoder of any exporter, or its directory.")],
    maps: Annotated[Path, typer.Option(metavar="FILE", help="The maps.safetensors of a run.")],
    output: Annotated[Path, typer.Option(metavar="OUT", help="A new directory to write.")],
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help='Use only these maps ("0,7,24-29"); default: all maps.')
    ] = None,
    tap: Annotated[
        str | None, typer.Option(metavar="TAP", help="Input of the maps; default: the tap that FILE records.")
    ] = None,
) -> None:
    """Replace layers of any ONNX decoder by maps, without torch."""
    from nbl_export.run.rewrite_given import rewrite_given

    print(rewrite_given(graph, maps, layers, tap, output))


def verify(directory: opt.Run, as_json: opt.Json = False) -> None:
    """Compare the exported graphs with the torch models."""
    from nbl_export.report.console import checks_table
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import VERIFY_FILE

    run = run_stages(directory, "verify", ui(as_json))
    result = run.read_json(VERIFY_FILE)
    show(result, checks_table(result), as_json)


@opt.takes("build")
def build(directory: opt.Run, asked: dict[str, Any], force: opt.Force = False) -> None:
    """Compile both decoders; run this on the target machine."""
    from nbl_export.run.pipeline import run_stages

    run_stages(directory, "build", ui(), changes=asked, force=force, needs="build")
    print(directory / "engine" / "model")


def report(directory: opt.Run, force: opt.Force = False) -> None:
    """Write report.html, report.md and report.json."""
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import REPORT_HTML

    run_stages(directory, "report", ui(), force=force)
    print(directory / REPORT_HTML)


COMMANDS = (
    ("calibrate", calibrate, False),
    ("plan", plan, False),
    ("rewrite", rewrite, False),
    ("rewrite-graph", rewrite_graph, False),
    ("verify", verify, False),
    ("build", build, False),
    ("report", report, False),
)  # name, function, hidden from the first page of help
