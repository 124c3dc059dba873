"""Commands that accept an engine, and measure speed, operators and quality."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export.cli import options as opt
from nbl_export.cli.show import show, ui
from nbl_export.errors import UsageError
from nbl_export.options.options import JobOptions

__all__ = ["COMMANDS"]


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
    form: Annotated[
        str | None, typer.Option("--format", metavar="FORMAT", help="table (default), md, csv, json or llama-bench.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write to FILE; .md, .csv or .json sets the format.")
    ] = None,
    lossless: Annotated[bool, typer.Option("--lossless", help="Measure lossless/ of a run beside original/.")] = False,
    force: opt.Force = False,
    trust_engine: opt.TrustEngine = False,
    as_json: opt.Json = False,
) -> None:
    """Measure decoders side by side.

    The decoders are those of one run, or of several directories.
    """
    from nbl_export.report import bench_formats
    from nbl_export.report.console import speed_table
    from nbl_export.run import compare
    from nbl_export.run.deployed import trust_engines
    from nbl_export.run.pipeline import run_stages
    from nbl_export.run_directory import REPORT_JSON

    if trust_engine:
        trust_engines([*directories, *([against] if against else [])])
    if lossless:
        return _bench_speculative(directories, asked, [against, form, output], as_json)
    chosen = bench_formats.format_of(form, output, as_json=as_json)
    bench_formats.check_output(output)
    if compare.is_stage(directories, against, form, output):
        run = run_stages(directories[0], "report", ui(as_json), changes=asked, force=force, needs="bench")
        result = run.read_json(REPORT_JSON)
        return show(result, speed_table(result), as_json)
    value = compare.compare(directories, against, JobOptions("", **asked), ui(as_json), force=force)
    text = bench_formats.render(value, chosen, None if sys.stdout.isatty() and not output else 140)
    if output is None:
        return print(text, end="")
    bench_formats.write(text, output)
    return print(output)


def _bench_speculative(directories: list[Path], asked: dict[str, Any], others: list[Any], as_json: bool) -> None:
    from nbl_export.report.console import speculative_table
    from nbl_export.run.speculative import bench_speculative

    if len(directories) != 1 or any(others):
        raise typer.BadParameter(
            "takes one run directory, and neither --against, --format nor --output", param_hint="--lossless"
        )
    found = bench_speculative(directories[0], asked, ui(as_json))
    show(found, speculative_table(found), as_json)


@opt.takes("profile")
def profile(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or a GenAI model directory.")],
    asked: dict[str, Any],
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Time each operator with ONNX Runtime's profiler."""
    from nbl_export.report.console import profile_table
    from nbl_export.run import profile as profiling

    profiling.check_request(asked)
    found = profiling.profile(directory, JobOptions("", **asked), ui(as_json), force=force)
    show(found, profile_table(found), as_json)


def evaluate(
    directory: opt.Run,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="lm-evaluation-harness tasks: lambada_openai,arc_easy,piqa,wikitext."),
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="NAME=FILE,...", help="Measure perplexity on these texts.")
    ] = None,
    variants: Annotated[
        str, typer.Option(metavar="VARIANT,...", help="original, nbl (the exported graphs), torch-original, torch-nbl.")
    ] = "original,nbl",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Use the first N documents or windows; default: all.")
    ] = None,
    data: Annotated[Path | None, typer.Option(metavar="FILES", help="Local documents: FILES/TASK/SPLIT.jsonl.")] = None,
    ppl_context: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Tokens of a --perplexity window; default 512.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens between windows; default: the context.")
    ] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Run benchmarks and measure perplexity on the exported graphs."""
    from nbl_export.evaluation.perplexity import parse_named
    from nbl_export.records.requests import EvalRequest
    from nbl_export.report.console import eval_table
    from nbl_export.run.evaluate import evaluate as run_evaluation
    from nbl_export.run_directory import EVAL_FILE

    for given, flag, needs, named in (
        (ppl_context, "--ppl-context", "--perplexity", perplexity),
        (stride, "--stride", "--perplexity", perplexity),
        (data, "--data", "--tasks", tasks),
    ):
        if given is not None and not named:
            raise UsageError(f"{flag} is for {needs}; leave {flag} out")
    context = ppl_context or 512
    request = EvalRequest(
        tasks=_words(tasks), variants=_words(variants), limit=limit, data=data,
        texts=tuple(parse_named(perplexity)) if perplexity else (),
        context=context, stride=context if stride is None else stride,
    )  # fmt: skip
    run = run_evaluation(directory, request, ui(as_json), force=force)
    result = run.read_json(EVAL_FILE)
    show(result, eval_table(result), as_json)


def _words(listed: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (listed or "").split(",") if word.strip())


def accept(
    directory: opt.Run, force: opt.Force = False, trust_engine: opt.TrustEngine = False, as_json: opt.Json = False
) -> None:
    """Accept the engines of a run on the GPU machine that will run them.

    Logits, text and caches are compared with values that verification has left in the directory.
    """
    from nbl_export.report.console import ladder_table
    from nbl_export.run.accept import accept as run_acceptance
    from nbl_export.run.accept import refuse_failed
    from nbl_export.run.deployed import trust_engines

    if trust_engine:
        trust_engines([directory])
    found = run_acceptance(directory, ui(as_json), force=force)
    show(found, ladder_table(found["checks"], f"Acceptance, {found['engine']}"), as_json)
    refuse_failed(found, directory)


COMMANDS = (
    ("accept", accept, False),
    ("bench", bench, False),
    ("profile", profile, False),
    ("eval", evaluate, False),
)  # name, function, hidden from the first page of help
