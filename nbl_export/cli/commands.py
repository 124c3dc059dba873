"""The subcommands: of single stages, of measurements, and of finished runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export.cli import options as opt
from nbl_export.cli.options import show, ui
from nbl_export.errors import UsageError
from nbl_export.options.option import MAIN
from nbl_export.options.options import JobOptions
from nbl_export.trust.terminal import visible

__all__ = ["COMMANDS", "FOR_DEVELOPERS"]


# -- stages ------------------------------------------------------------------------------------------------------


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

    print(run_calibration(model, asked, output, ui(), force=force) / MOMENTS_FILE)


@opt.takes("plan")
def plan(directory: opt.Run, asked: dict[str, Any], as_json: opt.Json = False) -> None:
    """Score layers, choose which to replace, fit their maps."""
    from nbl_export.report.model import scores
    from nbl_export.run.pipeline import run_stages

    run = run_stages(directory, "plan", ui(as_json), changes=asked)
    shown = ("num_layers", "replaced_layers", "tap", "select", "fit", "goal", "curve", "scores")
    facts = {k: run.manifest[k] for k in shown}
    return show(facts, scores(run.manifest, "Layers, smallest bound first"), as_json)


@opt.takes("rewrite")
def rewrite(directory: opt.Run, asked: dict[str, Any]) -> None:
    """Write the decoder graph of a run and its NBL version."""
    from nbl_export.run.pipeline import run_stages

    run_stages(directory, "rewrite", ui(), changes=asked)
    print(directory / "model")


def rewrite_graph(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="An ONNX decoder of any exporter, or its directory.")],
    maps: Annotated[Path, typer.Option(metavar="DIR|FILE", help="A run, or its maps.safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A new directory to write.")],
    layers: Annotated[
        str | None, typer.Option(metavar="LAYERS", help='Use only these maps ("0,7,24-29"); default: all maps.')
    ] = None,
) -> None:
    """Replace layers of any ONNX decoder by maps, without torch."""
    from nbl_export.run.rewrite_given import rewrite_given

    print(rewrite_given(graph, maps, layers, output))


@opt.takes("verify")
def verify(directory: opt.Run, asked: dict[str, Any], as_json: opt.Json = False) -> None:
    """Compare the NBL graph with the original graph, and that with the torch model."""
    from nbl_export.report.console import checks_table
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import VERIFY_FILE

    run = run_stages(directory, "verify", ui(as_json), changes=asked)
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


# -- speed, operators and quality ----------------------------------------------------------------------------------


@opt.takes("bench")
def bench(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR ...", help="Run directories (their model/), or GenAI model directories."),
    ],
    asked: dict[str, Any],
    against: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Compare with this directory; default: original/ of the first run."),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Measure decoders side by side.

    The decoders are those of one run, or of several directories.
    """
    from nbl_export.report import console, page
    from nbl_export.run.compare import compare
    from nbl_export.run.deployed import is_model_directory
    from nbl_export.run.pipeline import run_stages

    if len(directories) == 1 and against is None and not is_model_directory(directories[0]):
        run = run_stages(directories[0], "report", ui(as_json), changes=asked, force=force, needs="bench")
        result = page.of_run(run)
        return show(result, console.speed_table(result), as_json)
    value = compare(directories, against, JobOptions("", **asked), ui(as_json), force=force)
    return show(value, console.compared_table(value), as_json)


@opt.takes("eval")
def evaluate(
    directory: opt.Run,
    asked: dict[str, Any],
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,...", help="Tasks of lm-evaluation-harness, such as arc_easy,piqa.")
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="NAME=FILE,...", help="Measure perplexity on these texts.")
    ] = None,
    long_context: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=FILE,...",
            help="Measure loss by position, retrieval and copying in long windows of these texts.",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Take documents of tasks from DIR/TASK/SPLIT.jsonl, if present.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N documents, windows or keys; default: all.")
    ] = None,
    ppl_context: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of a window; default 512, and up to 4,096 with --long-context."),
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Measure tasks, perplexity and long texts on the graphs."""
    from nbl_export.records.requests import EvalRequest
    from nbl_export.report.console import eval_table
    from nbl_export.run.pipeline import run_evaluation
    from nbl_export.run_directory import EVAL_FILE

    for given, flag, needs, named in (
        (ppl_context, "--ppl-context", "--perplexity and --long-context", perplexity or long_context),
        (data, "--data", "--tasks", tasks),
    ):
        if given is not None and not named:
            raise UsageError(f"{flag} is for {needs}; leave {flag} out")
    request = EvalRequest(
        tasks=_words(tasks),
        limit=limit,
        data=data,
        texts=_named("--perplexity", perplexity),
        long_texts=_named("--long-context", long_context),
        context=ppl_context,
    )
    run = run_evaluation(directory, request, ui(as_json), changes=asked, force=force)
    result = run.read_json(EVAL_FILE)
    show(result, eval_table(result), as_json)


def _words(listed: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (listed or "").split(",") if word.strip())


def _named(option: str, listed: str | None) -> tuple[tuple[str, str], ...]:
    """The pairs (name, file) of NAME=FILE,NAME=FILE, which an option got."""
    pairs = []
    for word in _words(listed):
        name, _, file = (part.strip() for part in word.partition("="))
        if not (name and file):
            raise UsageError(f"{option}: write NAME=FILE, comma separated, not {word!r}")
        pairs.append((name, file))
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"{option}: two texts have the same name; give each text its own name")
    return tuple(pairs)


def accept(directory: opt.Run, force: opt.Force = False, as_json: opt.Json = False) -> None:
    """Check the engines of a run on the GPU that will run them.

    Logits, text and caches are compared with values that verification has left in the directory.
    """
    from nbl_export.report.model import checks
    from nbl_export.run.accept import accept as run_acceptance
    from nbl_export.run.accept import refuse_failed

    found = run_acceptance(directory, ui(as_json), force=force)
    show(found, checks(found["checks"], f"Acceptance, {found['engine']}"), as_json)
    refuse_failed(found, directory)


# -- finished runs -------------------------------------------------------------------------------------------------


def card(
    directory: opt.Run,
    base_model: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Hub id of the base model, if the run was made from files.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on despite a failed verification, and overwrite an edited card.")
    ] = False,
) -> None:
    """Write the model card, README.md of the model folder."""
    from nbl_export.publish.card import write_card

    print(write_card(directory, base_model, force=force))


def convert(
    directory: opt.Run,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="transformers, nemotron-nas, mlx, edge-llm or ngram (the original, which GenAI decodes with "
            "n-grams); or the destination: vllm, tensorrt-llm, ... Without it, destinations are listed.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="TARGET", help="The new directory.")] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Write the NBL model, or the original with n-grams, for other engines."""
    if to is None:
        from nbl_export.report.console import routes_table
        from nbl_export.run.destinations import routes

        if output is not None:
            raise UsageError("--output is for --to; leave --output out to list destinations")
        found = [dataclasses.asdict(route) for route in routes(directory)]
        return show(found, routes_table(found), as_json)
    if output is None:
        raise UsageError(f"--to {to} needs --output, a new directory; see nbl-export convert --help")
    if as_json:
        raise UsageError("--json is for the list of destinations; leave --json out")
    from nbl_export.publish.convert import convert as write

    write(directory, to, output, ui(), force=force)
    return print(output)


def generate(
    directory: opt.Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to continue or answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N")] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    original: Annotated[bool, typer.Option("--original", help="Use the original decoder instead.")] = False,
    both: Annotated[bool, typer.Option("--both", help="Answer by the original decoder, then by the NBL one.")] = False,
    force: opt.Force = False,
) -> None:
    """Stream an answer from the exported decoder."""
    from nbl_export.run.deployed import answers

    if original and both:
        raise typer.BadParameter("give one of --original and --both", param_hint="--both")
    subjects = ("original", "nbl") if both else ("original",) if original else ("nbl",)
    for title, pieces in answers(directory, subjects, prompt, max_new_tokens, raw=raw, force=force):
        print(f"{title}:" if both else "", end="\n" if both else "")
        for piece in pieces:
            print(visible(piece), end="", flush=True)
        print()


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR|FILE.onnx", help="A run directory, or any decoder graph.")],
    as_json: opt.Json = False,
) -> None:
    """Show the contents of a run directory or of an ONNX decoder."""
    from nbl_export.graph.given import has_graph, onnx_tools
    from nbl_export.report.console import describe_table, graph_table
    from nbl_export.run.deployed import describe

    if has_graph(directory):
        onnx_tools()
        from nbl_export.graph.describe import describe_graph

        found = describe_graph(directory)
        return show(found, graph_table(found), as_json)
    facts = describe(directory)
    return show(facts, describe_table(facts), as_json)


@opt.takes(MAIN)
def estimate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, checkpoint directory, config.json or GGUF.")],
    asked: dict[str, Any],
    as_json: opt.Json = False,
) -> None:
    """Say what the main job will take here, and what it gains. No weight is read.

    Takes every option of the main job.
    """
    from nbl_export.report.estimate import estimate_table
    from nbl_export.run.estimate import estimate as estimated

    found = estimated(model, asked)
    show(found, estimate_table(found), as_json)


def doctor(as_json: opt.Json = False) -> None:
    """List the engines that work here, and why others do not."""
    from nbl_export.report.console import doctor_table
    from nbl_export.run.deployed import examine_engines
    from nbl_export.run.estimate import spoken_machine
    from nbl_export.targets.gpu import find_gpu, spoken

    found = examine_engines()
    show(found, doctor_table(found, spoken_machine(), spoken(find_gpu())), as_json)


FOR_DEVELOPERS = ("calibrate", "rewrite", "rewrite-graph", "verify", "build", "accept")  # not on the first page of help
COMMANDS: dict[str, Callable[..., None]] = {
    "calibrate": calibrate, "plan": plan, "rewrite": rewrite, "rewrite-graph": rewrite_graph, "verify": verify,
    "build": build, "report": report, "accept": accept, "bench": bench, "eval": evaluate,
    "card": card, "convert": convert, "generate": generate, "inspect": inspect,
    "estimate": estimate, "doctor": doctor,
}  # fmt: skip
