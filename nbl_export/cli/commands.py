"""The subcommands: of single stages, of measurements, and of finished runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from nbl_export.cli.options import FORCE, JSON, MODEL, OUTPUT, PATH, RUN, command, show, ui
from nbl_export.errors import MissingPackageError, UsageError
from nbl_export.options.option import MAIN
from nbl_export.options.options import JobOptions
from nbl_export.trust.terminal import visible

__all__ = ["COMMANDS"]


# -- stages ------------------------------------------------------------------------------------------------------


@command(
    "calibrate",
    MODEL(required=True),
    OUTPUT(required=True),
    click.Option(["--force"], is_flag=True, help="Start over: remove the run in DIR first."),
    takes="calibrate",
    hidden=True,
)
def calibrate(model: str, output: Path, asked: dict[str, Any], force: bool) -> None:
    """Collect the moments of every layer from calibration text."""
    from nbl_export.run.pipeline import run_calibration
    from nbl_export.run_directory import SUMS_FILE

    print(run_calibration(model, asked, output, ui(), force=force) / SUMS_FILE)


@command("plan", RUN, JSON, takes="plan")
def plan(directory: Path, asked: dict[str, Any], as_json: bool) -> None:
    """Score layers, choose which to replace, fit their maps."""
    from nbl_export.report.model import scores
    from nbl_export.run.pipeline import run_stages

    run = run_stages(directory, "plan", ui(as_json), changes=asked)
    shown = ("num_layers", "replaced_layers", "exit", "tap", "select", "fit", "goal", "curve", "scores")
    facts = {k: run.manifest.get(k) for k in shown}
    if as_json or facts["scores"]:  # an exit layer has no scores of single layers
        show(facts, scores(run.manifest, "Layers, smallest bound first"), as_json)


@command("rewrite", RUN, takes="rewrite", hidden=True)
def rewrite(directory: Path, asked: dict[str, Any]) -> None:
    """Write the decoder graph of a run and its NBL version."""
    from nbl_export.run.pipeline import run_stages

    run_stages(directory, "rewrite", ui(), changes=asked)
    print(directory / "model")


@command(
    "rewrite-graph",
    click.Argument(["graph"], type=PATH, metavar="GRAPH", help="An ONNX decoder of any exporter, or its directory."),
    click.Option(["--maps"], type=PATH, required=True, metavar="DIR|FILE", help="A run, or its maps.safetensors."),
    click.Option(["--output", "-o"], type=PATH, required=True, metavar="OUT", help="A new directory to write."),
    click.Option(["--layers"], metavar="LAYERS", help='Use only these maps ("0,7,24-29"); default: all maps.'),
    hidden=True,
)
def rewrite_graph(graph: Path, maps: Path, output: Path, layers: str | None) -> None:
    """Replace layers of any ONNX decoder by maps, without torch."""
    _require_onnx()
    from nbl_export.run.rewrite_graph import rewrite_graph as write

    print(write(graph, maps, layers, output))


def _require_onnx() -> None:
    """Raise MissingPackageError if onnx or onnx_ir is not installed."""
    try:
        import nbl_export.graph.external_graph  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(str(error.name), "rewrite", "reading ONNX graphs") from error


@command("verify", RUN, JSON, takes="verify", hidden=True)
def verify(directory: Path, asked: dict[str, Any], as_json: bool) -> None:
    """Compare the NBL graph with the original graph, and that with the torch model.

    DIR may also be a checkpoint that `convert --to transformers` or `vllm` wrote: it is compared with the run's model.
    """
    from nbl_export.publish.checkpoint_check import is_checkpoint
    from nbl_export.report.console import checks_table
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import VERIFY_FILE

    if is_checkpoint(directory):
        _verify_checkpoint(directory, asked, as_json)
        return
    run = run_stages(directory, "verify", ui(as_json), changes=asked)
    result = run.read_json(VERIFY_FILE)
    show(result, checks_table(result), as_json)


def _verify_checkpoint(directory: Path, asked: dict[str, Any], as_json: bool) -> None:
    from nbl_export.publish.checkpoint_check import refuse_failed, verify_checkpoint
    from nbl_export.report.model import checks

    if asked:
        raise UsageError(f"{directory} is a checkpoint, which takes no options of a run; leave them out")
    found = verify_checkpoint(directory)
    refuse_failed(found, directory)
    value = dataclasses.asdict(found)
    show(value, (checks([value], "Checkpoint"),), as_json)


@command("build", RUN, FORCE, takes="build", hidden=True)
def build(directory: Path, asked: dict[str, Any], force: bool) -> None:
    """Compile both decoders; run this on the target machine."""
    from nbl_export.run.pipeline import run_stages

    run_stages(directory, "build", ui(), changes=asked, force=force, needs="build")
    print(directory / "engine" / "model")


@command("report", RUN, FORCE)
def report(directory: Path, force: bool) -> None:
    """Write report.html, report.md and report.json."""
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import REPORT_HTML

    run_stages(directory, "report", ui(), force=force)
    print(directory / REPORT_HTML)


# -- speed, operators and quality ----------------------------------------------------------------------------------


@command(
    "bench",
    click.Argument(
        ["directories"],
        type=PATH,
        nargs=-1,
        required=True,
        metavar="DIR ...",
        help="Run directories (their model/), or GenAI model directories.",
    ),
    click.Option(
        ["--against"],
        type=PATH,
        metavar="DIR",
        help="Compare with this directory; default: original/ of the first run.",
    ),
    FORCE,
    JSON,
    takes="bench",
)
def bench(
    directories: tuple[Path, ...], asked: dict[str, Any], against: Path | None, force: bool, as_json: bool
) -> None:
    """Measure decoders side by side.

    The decoders are those of one run, or of several directories.
    """
    from nbl_export.report import console, page
    from nbl_export.run.compare import compare
    from nbl_export.run.pipeline import run_stages
    from nbl_export.targets import owner_of

    if len(directories) == 1 and against is None and owner_of(directories[0]) is None:
        run = run_stages(directories[0], "report", ui(as_json), changes=asked, force=force, needs="bench")
        result = page.of_run(run)
        show(result, console.speed_table(result), as_json)
        return
    value = compare(list(directories), against, JobOptions("", **asked), ui(as_json), force=force)
    show(value, console.compared_table(value), as_json)


@command(
    "eval",
    RUN,
    click.Option(
        ["--tasks"],
        metavar="TASK,...",
        help="Tasks of lm-evaluation-harness, such as arc_easy,piqa, or YAML files of tasks in its form.",
    ),
    click.Option(["--perplexity"], metavar="NAME=FILE,...", help="Measure perplexity on these texts."),
    click.Option(
        ["--long-context"],
        metavar="NAME=FILE,...",
        help="Measure loss by position, retrieval and copying in long windows of these texts.",
    ),
    click.Option(
        ["--limit"],
        type=click.IntRange(1),
        metavar="N",
        help="Use the first N documents, windows or keys; default: all.",
    ),
    click.Option(
        ["--ppl-context"],
        type=click.IntRange(2),
        metavar="N",
        help="Tokens of a window; default 512, and up to 4,096 with --long-context.",
    ),
    FORCE,
    JSON,
    takes="eval",
)
def evaluate(
    directory: Path,
    asked: dict[str, Any],
    tasks: str | None,
    perplexity: str | None,
    long_context: str | None,
    limit: int | None,
    ppl_context: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Measure tasks, perplexity and long texts on the graphs."""
    from nbl_export.records.requests import EvalRequest
    from nbl_export.report.console import eval_table
    from nbl_export.run.pipeline import run_evaluation
    from nbl_export.run_directory import EVAL_FILE

    if ppl_context is not None and not (perplexity or long_context):
        raise UsageError("--ppl-context is for --perplexity and --long-context; leave --ppl-context out")
    request = EvalRequest(
        tasks=_words(tasks),
        limit=limit,
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


@command("accept", RUN, FORCE, JSON, hidden=True)
def accept(directory: Path, force: bool, as_json: bool) -> None:
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


@command(
    "card",
    RUN,
    click.Option(
        ["--base-model"], metavar="OWNER/NAME", help="Hub id of the base model, if the run was made from files."
    ),
    click.Option(["--force"], is_flag=True, help="Go on despite a failed verification, and overwrite an edited card."),
)
def card(directory: Path, base_model: str | None, force: bool) -> None:
    """Write the model card, README.md of the model folder."""
    from nbl_export.publish.card import write_card

    print(write_card(directory, base_model, force=force))


@command(
    "convert",
    RUN,
    click.Option(
        ["--to"],
        metavar="FORM",
        help="transformers, nemotron-nas, mlx or edge-llm; or the destination: vllm, tensorrt-llm, ... "
        "Without it, destinations are listed.",
    ),
    click.Option(["--output", "-o"], type=PATH, metavar="TARGET", help="The new directory."),
    FORCE,
    JSON,
)
def convert(directory: Path, to: str | None, output: Path | None, force: bool, as_json: bool) -> None:
    """Write the NBL model for other engines."""
    if to is None:
        from nbl_export.publish.convert import routes
        from nbl_export.report.console import routes_table

        if output is not None:
            raise UsageError("--output is for --to; leave --output out to list destinations")
        found = [dataclasses.asdict(route) for route in routes(directory)]
        show(found, routes_table(found), as_json)
        return
    if output is None:
        raise UsageError(f"--to {to} needs --output, a new directory; see nbl-export convert --help")
    if as_json:
        raise UsageError("--json is for the list of destinations; leave --json out")
    from nbl_export.publish.convert import convert as write

    write(directory, to, output, ui(), force=force)
    print(output)


@command(
    "generate",
    RUN,
    click.Argument(["prompt"], metavar="PROMPT", help="What to continue or answer."),
    click.Option(
        ["--max-new-tokens"],
        type=click.IntRange(1),
        metavar="N",
        default=256,
        show_default=True,
        help="Most tokens of the answer.",
    ),
    click.Option(["--raw"], is_flag=True, help="No chat template."),
    click.Option(["--original"], is_flag=True, help="Use the original decoder instead."),
    click.Option(["--both"], is_flag=True, help="Answer by the original decoder, then by the NBL one."),
    FORCE,
)
def generate(
    directory: Path, prompt: str, max_new_tokens: int, raw: bool, original: bool, both: bool, force: bool
) -> None:
    """Stream an answer from the exported decoder."""
    from nbl_export.run.deployed import answers

    if original and both:
        raise click.BadParameter("give one of --original and --both", param_hint="--both")
    subjects = ("original", "nbl") if both else ("original",) if original else ("nbl",)
    for title, pieces in answers(directory, subjects, prompt, max_new_tokens, raw=raw, force=force):
        print(f"{title}:" if both else "", end="\n" if both else "")
        for piece in pieces:
            print(visible(piece), end="", flush=True)
        print()


@command(
    "inspect",
    click.Argument(["directory"], type=PATH, metavar="DIR|FILE.onnx", help="A run directory, or a decoder."),
    JSON,
)
def inspect(directory: Path, as_json: bool) -> None:
    """Show a run directory, or a decoder and what slows its prefill."""
    from nbl_export.graph.names import has_graph, has_ir
    from nbl_export.report.console import describe_table, graph_table, ir_table
    from nbl_export.run.deployed import describe

    if has_graph(directory):
        _require_onnx()
        from nbl_export.graph.external_graph import describe_graph

        found = describe_graph(directory)
        show(found, graph_table(found), as_json)
        return
    if has_ir(directory):
        from nbl_export.graph.ir.findings import describe_ir

        found = describe_ir(directory)
        show(found, ir_table(found), as_json)
        return
    facts = describe(directory)
    show(facts, describe_table(facts), as_json)


@command(
    "estimate",
    click.Argument(["model"], metavar="MODEL", help="Hub id, checkpoint directory, config.json or GGUF."),
    JSON,
    takes=MAIN,
)
def estimate(model: str, asked: dict[str, Any], as_json: bool) -> None:
    """Say what the main job will take here, and what it gains. No weight is read.

    Takes every option of the main job.
    """
    from nbl_export.report.estimate import estimate_table
    from nbl_export.run.estimate import estimate as estimated

    found = estimated(model, asked)
    show(found, estimate_table(found), as_json)


@command("doctor", JSON)
def doctor(as_json: bool) -> None:
    """List the engines that work here, and why others do not."""
    from nbl_export.report.console import doctor_table
    from nbl_export.run.deployed import examine_engines
    from nbl_export.run.estimate import describe_machine
    from nbl_export.targets.gpu import describe_gpu, find_gpu

    found = examine_engines()
    show(found, doctor_table(found, describe_machine(), describe_gpu(find_gpu())), as_json)


COMMANDS: dict[str, click.Command] = {
    str(made.name): made
    for made in (
        calibrate,
        plan,
        rewrite,
        rewrite_graph,
        verify,
        build,
        report,
        accept,
        bench,
        evaluate,
        card,
        convert,
        generate,
        inspect,
        estimate,
        doctor,
    )
}
