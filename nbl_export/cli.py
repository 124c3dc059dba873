"""The command line: flags -> options -> pipeline. No logic of its own.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 something the user can put right,
2 usage, 3 verification failed, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export import __version__, cli_machine
from nbl_export import cli_options as opt
from nbl_export.cli_exit import GOES_ON, INTERRUPTED, Interrupts, explain, fail, show
from nbl_export.terminal import Formatter, visible

__all__ = ["main"]

app = typer.Typer(
    name="nbl-export",
    help="Replace self-attention layers of a decoder LLM by closed-form linear layers; export, verify, measure.",
    no_args_is_help=False,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _ui(quiet: bool = False) -> Any:
    from nbl_export.progress import Ui

    return Ui(quiet=quiet)


@app.callback(invoke_without_command=True)
def root(
    context_: typer.Context,
    model: Annotated[str | None, typer.Option(help="Hub id, directory with safetensors, or GGUF.")] = None,
    engine: opt.Engine = "ort",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory.")] = None,
    layers: opt.Layers = None,
    max_perplexity_increase: opt.MaxIncrease = None,
    target_speedup: opt.TargetSpeedup = None,
    kv_budget: opt.KvBudget = None,
    select: opt.Select = None,
    method: opt.Method = None,
    rank: opt.Rank = None,
    tap: opt.Tap = None,
    fit: opt.Fit = None,
    distill_steps: opt.DistillSteps = None,
    distill_minutes: opt.DistillMinutes = None,
    distill_tokens: opt.DistillTokens = None,
    distill_dtype: opt.DistillDtype = None,
    lora_rank: opt.LoraRank = None,
    label_weight: opt.LabelWeight = None,
    precision: opt.Precision = None,
    decoder_source: opt.Source = None,
    provider: opt.Provider = None,
    builder_option: opt.BuilderOption = None,
    quantized_model: opt.QuantizedModel = None,
    map_bits: opt.MapBits = None,
    token_table: opt.TokenTable = None,
    max_seq_len: opt.MaxSeqLen = None,
    max_batch: opt.MaxBatch = None,
    prefill_chunk: opt.PrefillChunk = None,
    logits: opt.Logits = None,
    calibration: opt.Calibration = None,
    calibration_tokens: opt.CalibrationTokens = None,
    context: opt.Context = None,
    data_free: opt.DataFree = None,
    layer_wise: opt.LayerWise = None,
    depth: opt.Depth = None,
    repetitions: opt.Repetitions = None,
    batch: opt.Batch = None,
    prompt_tokens: opt.PromptTokens = None,
    generate_tokens: opt.GenerateTokens = None,
    threads: opt.Threads = None,
    seed: opt.Seed = None,
    force: opt.Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the libraries say.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """The main job: a checkpoint in, a verified and measured NBL decoder out. Subcommands run single stages."""
    given = dict(locals())  # the options by name: each is one of JobOptions
    _log(verbose)
    if version:
        print(__version__)
        return
    if context_.invoked_subcommand is not None:
        opt.refuse_options_before(context_)
        return
    if model is None or output is None:
        missing = "--model" if model is None else "--output"
        raise typer.BadParameter("is needed for the main job", param_hint=missing)
    _main_job(given)


def _log(verbose: bool) -> None:
    """What the libraries say, on standard error."""
    level = logging.DEBUG if verbose else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _main_job(given: dict[str, Any]) -> None:
    """Run it with the options of `root`, by name."""
    from nbl_export.pipeline import run_job
    from nbl_export.preflight import engine_defaults
    from nbl_export.records import JobOptions

    model, engine, output = given["model"], given["engine"], given["output"]
    asked = {field.name for field in dataclasses.fields(JobOptions)} - {"model", "engine"} | {"depth", "batch"}
    chosen = opt.given_options(**{name: value for name, value in given.items() if name in asked})
    defaults = {
        **engine_defaults(engine, given["provider"] or "cpu"),
        **({"tap": "normed"} if given["fit"] == "distilled" else {}),
    }
    options = JobOptions(**{**defaults, "model": model, "engine": engine, **chosen})
    if run_job(options, output, _ui(), force=given["force"]) is not None:
        print(output / "report.html")


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Hub id, directory with safetensors, or GGUF.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The run directory.")],
    calibration: opt.Calibration = None,
    calibration_tokens: opt.CalibrationTokens = None,
    context: opt.Context = None,
    tap: opt.Tap = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of --data-free (default 0).")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only part I of N; see merge.")] = None,
    data_free: opt.DataFree = None,
    layer_wise: opt.LayerWise = None,
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
) -> None:
    """Collect the moments of every layer into a run directory."""
    from nbl_export.pipeline import run_calibration
    from nbl_export.shards import parse_shard

    parse_shard(shard)
    chosen = opt.given_options(
        calibration=calibration, calibration_tokens=calibration_tokens, context=context, tap=tap, shard=shard,
        seed=seed, data_free=data_free, layer_wise=layer_wise,
    )  # fmt: skip
    if run_calibration(model, chosen, output, _ui(), force=force) is not None:
        print(output / "moments.safetensors")


@app.command()
def merge(
    inputs: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Run directories of calibrate --shard.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The run directory to make.")],
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
) -> None:
    """Put the shards of a calibration together into a run directory that plan goes on from."""
    from nbl_export.pipeline import run_merge

    run_merge(inputs, output, _ui(), force=force)
    print(output / "moments.safetensors")


@app.command()
def plan(
    directory: opt.Run,
    layers: opt.Layers = None,
    max_perplexity_increase: opt.MaxIncrease = None,
    target_speedup: opt.TargetSpeedup = None,
    kv_budget: opt.KvBudget = None,
    select: opt.Select = None,
    method: opt.Method = None,
    rank: opt.Rank = None,
    tap: opt.Tap = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Quality and modelled speed of 0, 1, ... layers.")] = False,
    max_layers: Annotated[int | None, typer.Option(min=1, help="Where a sweep ends (default half of them).")] = None,
    as_json: opt.Json = False,
) -> None:
    """Score every layer, choose which to replace, fit their maps; --sweep shows quality against speed."""
    from nbl_export.inspection import scores_table
    from nbl_export.pipeline import run_stages, run_sweep
    from nbl_export.tradeoff import sweep_table

    changes = opt.given_options(
        layers=layers, max_perplexity_increase=max_perplexity_increase, target_speedup=target_speedup,
        kv_budget=kv_budget, select=select, method=method, rank=rank, tap=tap,
    )  # fmt: skip
    if sweep:
        found = run_sweep(directory, _ui(as_json), changes, max_layers).read_json("sweep.json")
        return show(found, sweep_table(found), as_json)
    if max_layers is not None:
        raise typer.BadParameter("goes with --sweep", param_hint="--max-layers")
    run = run_stages(directory, "plan", _ui(as_json), changes=changes)
    shown = ("num_layers", "replaced_layers", "tap", "select", "method", "ranks", "goal", "scores")
    facts = {k: run.manifest[k] for k in shown}
    return show(facts, scores_table(run.manifest), as_json)


@app.command()
def rewrite(
    directory: opt.MaybeRun = None,
    layers: opt.Layers = None,
    precision: opt.Precision = None,
    decoder_source: opt.Source = None,
    builder_option: opt.BuilderOption = None,
    quantized_model: opt.QuantizedModel = None,
    map_bits: opt.MapBits = None,
    token_table: opt.TokenTable = None,
    onnx: opt.Onnx = None,
    maps: opt.Maps = None,
    tap: opt.Tap = None,
    output: Annotated[Path | None, typer.Option(metavar="OUT", help="--onnx: the directory to write, new.")] = None,
) -> None:
    """Build the decoder graph of a run and write its NBL version, or that of a graph there is already (--onnx)."""
    if onnx is None:
        opt.refuse_with(None, "--onnx", maps=maps, tap=tap, output=output)
        if directory is None:
            raise typer.BadParameter("a run directory or --onnx is needed", param_hint="DIR")
        from nbl_export.pipeline import run_stages

        changes = opt.given_options(
            layers=layers, precision=precision, decoder_source=decoder_source,
            builder_option=builder_option, quantized_model=quantized_model, map_bits=map_bits, token_table=token_table,
        )  # fmt: skip
        run_stages(directory, "rewrite", _ui(), changes=changes)
        print(directory / "model")
        return
    opt.refuse_with(
        "--onnx", None,
        dir=directory, precision=precision, decoder_source=decoder_source, builder_option=builder_option,
        token_table=token_table, quantized_model=quantized_model,
    )  # fmt: skip
    if maps is None or output is None:
        raise typer.BadParameter("goes with --maps and --output", param_hint="--onnx")
    from nbl_export.given_graph import rewrite_given

    print(rewrite_given(onnx, maps, layers, tap, output, map_bits=map_bits))


@app.command()
def verify(directory: opt.Run, as_json: opt.Json = False) -> None:
    """Hold the exported graphs to the torch models."""
    from nbl_export.inspection import rungs_table
    from nbl_export.pipeline import run_stages

    run = run_stages(directory, "verify", _ui(as_json))
    result = run.read_json("verify.json")
    show(result, rungs_table(result), as_json)


@app.command()
def build(
    directory: opt.Run,
    engine: Annotated[str | None, typer.Option(help="trt or trt-rtx (default: the engine of the run).")] = None,
    max_batch: opt.MaxBatch = None,
    prefill_chunk: opt.PrefillChunk = None,
    force: opt.Force = False,
) -> None:
    """Compile both decoders, or compile them again on the machine that will run them."""
    from nbl_export.pipeline import run_stages

    changes = opt.given_options(engine=engine, max_batch=max_batch, prefill_chunk=prefill_chunk)
    run_stages(directory, "build", _ui(), changes=changes, force=force, needs="build")
    print(directory / "engine" / "model")


@app.command()
def bench(
    directories: opt.Decoders,
    against: opt.Against = None,
    profile: opt.Profile = False,
    depth: opt.Depth = None,
    repetitions: opt.Repetitions = None,
    batch: opt.Batch = None,
    prompt_tokens: opt.PromptTokens = None,
    generate_tokens: opt.GenerateTokens = None,
    threads: opt.Threads = None,
    seed: opt.Seed = None,
    force: opt.Force = False,
    form: opt.Format = None,
    output: opt.ResultFile = None,
    as_json: opt.Json = False,
) -> None:
    """Measure both decoders of a run beside each other, or decoders of any directories; --profile: their operators."""
    from nbl_export import bench_formats, comparison, profiling
    from nbl_export.inspection import speed_table
    from nbl_export.pipeline import run_stages
    from nbl_export.records import JobOptions

    changes = opt.given_options(
        depth=depth, repetitions=repetitions, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens,
        threads=threads, batch=batch, seed=seed,
    )  # fmt: skip
    chosen = bench_formats.format_of(form, output, as_json=as_json)
    bench_formats.check_output(output)
    if profile:
        profiling.check_request(directories, against, changes, form, output)
        found = profiling.profile(directories[0], JobOptions("", **changes), _ui(as_json), force=force)
        return show(found, profiling.profile_table(found), as_json)
    if comparison.is_stage(directories, against, form, output):
        run = run_stages(directories[0], "report", _ui(as_json), changes=changes, force=force, needs="bench")
        result = run.read_json("report.json")
        return show(result, speed_table(result), as_json)
    value = comparison.compare(directories, against, JobOptions("", **changes), _ui(as_json), force=force)
    text = bench_formats.render(value, chosen, None if sys.stdout.isatty() and not output else 140)
    if output is None:
        return print(text, end="")
    bench_formats.write(text, output)
    return print(output)


@app.command("eval")
def evaluate(
    directory: opt.Run,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness: lambada_openai,arc_easy,piqa,wikitext.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First documents, or windows, of each (default all).")
    ] = None,
    variants: Annotated[
        str, typer.Option(help="original, nbl (the exported graphs), torch-original, torch-nbl.")
    ] = "original,nbl",
    data: Annotated[
        Path | None, typer.Option(metavar="FILES", help="Local documents: FILES/TASK/SPLIT.jsonl, see README.")
    ] = None,
    perplexity: Annotated[
        str | None, typer.Option(help="Texts to measure perplexity on: NAME=FILE, comma separated.")
    ] = None,
    ppl_context: Annotated[int, typer.Option(min=2, help="Tokens of a --perplexity window.")] = 512,
    stride: Annotated[int | None, typer.Option(help="Tokens between windows (default: the context).")] = None,
    force: opt.Force = False,
    as_json: opt.Json = False,
) -> None:
    """Benchmarks and perplexity on the exported graphs: eval.json."""
    from nbl_export.evaluation.perplexity import parse_named
    from nbl_export.evaluation_job import EvalRequest
    from nbl_export.evaluation_job import evaluate as run_evaluation
    from nbl_export.inspection import eval_table

    request = EvalRequest(
        tasks=_words(tasks), variants=_words(variants), limit=limit, data=data,
        texts=tuple(parse_named(perplexity)) if perplexity else (),
        context=ppl_context, stride=ppl_context if stride is None else stride,
    )  # fmt: skip
    run = run_evaluation(directory, request, _ui(as_json), force=force)
    result = run.read_json("eval.json")
    show(result, eval_table(result), as_json)


def _words(listed: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (listed or "").split(",") if word.strip())


@app.command("save-checkpoint")
def save_checkpoint(
    directory: opt.Run,
    output: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="A new directory (default DIR/nbl-checkpoint).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on despite a failed verification.")] = False,
) -> None:
    """The NBL torch model as a Hugging Face directory: `import nbl_export.hf`, then AutoModelForCausalLM."""
    from nbl_export.torch_checkpoint import save

    print(save(directory, output, _ui(), force=force))


@app.command()
def report(directory: opt.Run, force: opt.Force = False) -> None:
    """Write report.html, report.md and report.json."""
    from nbl_export.pipeline import run_stages

    run_stages(directory, "report", _ui(), force=force)
    print(directory / "report.html")


@app.command()
def card(
    directory: opt.Run,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Hub id of the base model, where the run was made from files."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also of a run that failed verification, and over an edited card.")
    ] = False,
) -> None:
    """Write the model card, README.md of the model folder: base model, licence, layers, price, speed, use."""
    from nbl_export.card import write_card

    print(write_card(directory, base_model, force=force))


@app.command()
def push(
    directory: opt.Run,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    yes: Annotated[bool, typer.Option("--yes", help="Upload; without it only say what would go.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository, where there is none.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also a run that failed verification, or with a card of an older report.")
    ] = False,
    as_json: opt.Json = False,
) -> None:
    """Put the model folder on the Hugging Face hub; says what would go, and sends it with --yes."""
    from nbl_export.push import push_run, push_table

    found = push_run(directory, repo, _ui(as_json), send=yes, private=private, force=force)
    show(found, push_table(found), as_json)


@app.command()
def generate(
    directory: opt.Run,
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    original: Annotated[bool, typer.Option("--original", help="Use the original decoder instead.")] = False,
    force: opt.Force = False,
) -> None:
    """Stream an answer from the exported decoder (a run directory, or a model directory by itself)."""
    from nbl_export.serving import open_for_text

    with open_for_text(directory, original=original, force=force) as runner:
        for piece in runner.stream(runner.encode(prompt, chat=not raw), max_new_tokens):
            print(visible(piece), end="", flush=True)
    print()


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR|FILE.onnx", help="A run directory, or any decoder graph.")],
    as_json: opt.Json = False,
) -> None:
    """Show plan, graphs, caches and sizes of a run directory, or what is recognised in an ONNX graph."""
    from nbl_export.given_graph import describe_graph, has_graph
    from nbl_export.graph_table import graph_table
    from nbl_export.inspection import describe, describe_table

    if has_graph(directory):
        found = describe_graph(directory)
        return show(found, graph_table(found), as_json)
    facts = describe(directory)
    return show(facts, describe_table(facts), as_json)


@app.command()
def layout(
    directory: opt.Run,
    output: Annotated[Path, typer.Option(metavar="OUT", help="A new directory.")],
    runtime: Annotated[str, typer.Option("--for", help="transformers-js: Node and browsers.")] = "transformers-js",
) -> None:
    """Copy a finished model folder to where a runtime with file names of its own finds everything."""
    from nbl_export.layout import lay_out

    print(lay_out(directory, runtime, output))


app.command()(cli_machine.project)
app.command()(cli_machine.doctor)


def main() -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress, not the libraries'
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # deprecations inside libraries are not the user's to act on
    interrupts = Interrupts()
    try:
        status = app(prog_name="nbl-export", standalone_mode=False)
        if status == INTERRUPTED:  # typer has caught it
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
