"""The command line: flags -> options -> pipeline. No logic of its own.

Results go to stdout, everything else to stderr. Exit status: 0 done, 1 something the user can put right,
2 usage, 3 verification failed, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from nbl_export import __version__
from nbl_export.errors import NblError

__all__ = ["main"]

app = typer.Typer(
    name="nbl-export",
    help="Replace self-attention layers of a decoder LLM by closed-form linear layers; export, verify, measure.",
    no_args_is_help=False,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory made by nbl-export --output.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Layers = Annotated[
    str | None,
    typer.Option(help='How many ("8": chosen by --select) or which ("0,7,24-29"); default a quarter of them.'),
]
MaxIncrease = Annotated[
    str | None, typer.Option("--max-perplexity-increase", help="As many layers as keep to it on held-back text: 5%.")
]
TargetSpeedup = Annotated[
    str | None, typer.Option(help="As few layers as bring this modelled speed-up: 1.3 (of prefill) or 1.3@decode.")
]
KvBudget = Annotated[
    str | None, typer.Option(help="As few layers as make the KV cache fit: 64MiB@4096, or 15KiB for each token.")
]
Select = Annotated[
    str | None,
    typer.Option(help="Which layers go first: cca (smallest bound, default), error, or greedy (least lost in output)."),
]
Engine = Annotated[str, typer.Option(help="ort (ONNX Runtime), trt (TensorRT) or trt-rtx (TensorRT for RTX).")]
Precision = Annotated[
    str | None, typer.Option(help="ort: fp32 (default), fp16, int8, int4; trt, trt-rtx: fp16 (default), bf16, int4.")
]
Source = Annotated[str | None, typer.Option(help="ort: genai (default) or mobius; trt, trt-rtx: static.")]
Provider = Annotated[
    str | None,
    typer.Option(
        help="ort: provider to export for: cpu (default), cuda or nv-tensorrt-rtx; any machine exports, a GPU runs."
    ),
]
MaxSeqLen = Annotated[
    int | None, typer.Option(min=1, help="trt, trt-rtx: slots of a cache, answer included (default 2048).")
]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="trt, trt-rtx: most sequences at once (default 1).")]
PrefillChunk = Annotated[int | None, typer.Option(min=1, help="trt, trt-rtx: tokens of a prefill step (default 512).")]
Logits = Annotated[str | None, typer.Option(help="Logits of the last token (default), as generation needs, or all.")]
Method = Annotated[
    str | None,
    typer.Option(help="What replaces attention: nbl (fitted map, default), drop (nothing), wo-wv (own token only)."),
]
Rank = Annotated[str | None, typer.Option(help="Rank of the maps: a number, or auto (default: full maps).")]
Tap = Annotated[
    str | None,
    typer.Option(help="What a map is applied to: residual (default) or normed (default of --fit distilled)."),
]
Fit = Annotated[str | None, typer.Option(help="independent (closed form, default) or distilled (trained from there).")]
DistillSteps = Annotated[int | None, typer.Option(min=1, help="Training steps of --fit distilled (default 200).")]
DistillMinutes = Annotated[float | None, typer.Option(help="Stop --fit distilled after so many minutes.")]
DistillDtype = Annotated[str | None, typer.Option(help="Products of --fit distilled: auto (default), fp32 or bf16.")]
LoraRank = Annotated[
    int | None,
    typer.Option(min=0, help="--fit distilled: rank of the delta trained on each map (default 16; 0: whole matrices)."),
]
Calibration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT[:WEIGHT]",
        help="UTF-8 text, .jsonl or .json with a text field (also .gz), or a hub dataset id (org/name@split); "
        "again for more texts, mixed by weight.",
    ),
]
DataFree = Annotated[
    bool | None,
    typer.Option("--data-free", help="Calibrate on what the model itself says (sampled with --seed), on no text."),
]
LayerWise = Annotated[
    bool | None,
    typer.Option(
        "--layer-wise", help="Calibrate one decoder layer at a time; by itself where the weights do not fit memory."
    ),
]
CalibrationTokens = Annotated[int | None, typer.Option(min=1, help="Tokens to calibrate on (default 65536).")]
Context = Annotated[int | None, typer.Option(min=2, help="Window length in tokens (default 512).")]
Depth = Annotated[str | None, typer.Option(help="Tokens already in the cache, comma separated (default 0,2048).")]
Repetitions = Annotated[int | None, typer.Option(min=1, help="Measured rounds (default 5).")]
PromptTokens = Annotated[int | None, typer.Option(min=1, help="pp test length (default 512).")]
GenerateTokens = Annotated[int | None, typer.Option(min=1, help="tg test length (default 128).")]
Threads = Annotated[int | None, typer.Option(min=1, help="Engine threads (default: the engine's choice).")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the benchmark's token ids (default 0).")]
Force = Annotated[bool, typer.Option("--force", help="Start over, or go on despite a failed verification.")]


def _options(**given: Any) -> dict[str, Any]:
    """Drop what was not given; read the depth list."""
    chosen = {k: v for k, v in given.items() if v not in (None, [])}
    if "calibration" in chosen:
        chosen["calibration"] = tuple(chosen["calibration"])
    if "depth" in chosen:
        parts = str(chosen.pop("depth")).split(",")
        if not all(p.strip().isascii() and p.strip().isdigit() for p in parts):
            raise typer.BadParameter("write numbers of tokens, comma separated (0,2048)", param_hint="--depth")
        chosen["depths"] = tuple(int(p) for p in parts)
    return chosen


def _ui(quiet: bool = False) -> Any:
    from nbl_export.progress import Ui

    return Ui(quiet=quiet)


@app.callback(invoke_without_command=True)
def root(
    context_: typer.Context,
    model: Annotated[str | None, typer.Option(help="Hub id, directory with safetensors, or GGUF.")] = None,
    engine: Engine = "ort",
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="The run directory.")] = None,
    layers: Layers = None,
    max_perplexity_increase: MaxIncrease = None,
    target_speedup: TargetSpeedup = None,
    kv_budget: KvBudget = None,
    select: Select = None,
    method: Method = None,
    rank: Rank = None,
    tap: Tap = None,
    fit: Fit = None,
    distill_steps: DistillSteps = None,
    distill_minutes: DistillMinutes = None,
    distill_dtype: DistillDtype = None,
    lora_rank: LoraRank = None,
    precision: Precision = None,
    decoder_source: Source = None,
    provider: Provider = None,
    max_seq_len: MaxSeqLen = None,
    max_batch: MaxBatch = None,
    prefill_chunk: PrefillChunk = None,
    logits: Logits = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    context: Context = None,
    data_free: DataFree = None,
    layer_wise: LayerWise = None,
    depth: Depth = None,
    repetitions: Repetitions = None,
    prompt_tokens: PromptTokens = None,
    generate_tokens: GenerateTokens = None,
    threads: Threads = None,
    seed: Seed = None,
    force: Force = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what the libraries say.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """The main job: a checkpoint in, a verified and measured NBL decoder out. Subcommands run single stages."""
    given = dict(locals())  # the options by name: each is one of JobOptions
    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if verbose else logging.WARNING, format="%(levelname)s: %(message)s"
    )
    if version:
        print(__version__)
        return
    if context_.invoked_subcommand is not None:
        _refuse_options_before(context_)
        return
    if model is None or output is None:
        missing = "--model" if model is None else "--output"
        raise typer.BadParameter("is needed for the main job", param_hint=missing)
    from nbl_export.pipeline import engine_defaults, run_job
    from nbl_export.records import JobOptions

    asked = {field.name for field in dataclasses.fields(JobOptions)} - {"model", "engine"} | {"depth"}
    chosen = _options(**{name: value for name, value in given.items() if name in asked})
    defaults = {**engine_defaults(engine, provider or "cpu"), **({"tap": "normed"} if fit == "distilled" else {})}
    options = JobOptions(**{**defaults, "model": model, "engine": engine, **chosen})
    run_job(options, output, _ui(), force=force)
    print(output / "report.html")


def _refuse_options_before(context: typer.Context) -> None:
    """Options of the main job in front of a subcommand would be without effect."""
    for name in set(context.params) - {"verbose", "version"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"goes after {context.invoked_subcommand}, if it takes it", param_hint=flag)


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="Hub id, directory with safetensors, or GGUF.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The run directory.")],
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    context: Context = None,
    tap: Tap = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of --data-free (default 0).")] = None,
    shard: Annotated[str | None, typer.Option(metavar="I/N", help="Only part I of N; see merge.")] = None,
    data_free: DataFree = None,
    layer_wise: LayerWise = None,
    force: Annotated[bool, typer.Option("--force", help="Start over.")] = False,
) -> None:
    """Collect the moments of every layer into a run directory."""
    from nbl_export.pipeline import run_calibration
    from nbl_export.shards import parse_shard

    parse_shard(shard)
    chosen = _options(
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
    directory: Run,
    layers: Layers = None,
    max_perplexity_increase: MaxIncrease = None,
    target_speedup: TargetSpeedup = None,
    kv_budget: KvBudget = None,
    select: Select = None,
    method: Method = None,
    rank: Rank = None,
    tap: Tap = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Quality and modelled speed of 0, 1, ... layers.")] = False,
    max_layers: Annotated[int | None, typer.Option(min=1, help="Where a sweep ends (default half of them).")] = None,
    as_json: Json = False,
) -> None:
    """Score every layer, choose which to replace, fit their maps; --sweep shows quality against speed."""
    from nbl_export.inspection import scores_table
    from nbl_export.pipeline import run_stages, run_sweep
    from nbl_export.tradeoff import sweep_table

    changes = _options(
        layers=layers, max_perplexity_increase=max_perplexity_increase, target_speedup=target_speedup,
        kv_budget=kv_budget, select=select, method=method, rank=rank, tap=tap,
    )  # fmt: skip
    if sweep:
        found = run_sweep(directory, _ui(as_json), changes, max_layers).read_json("sweep.json")
        return _show(found, sweep_table(found), as_json)
    if max_layers is not None:
        raise typer.BadParameter("goes with --sweep", param_hint="--max-layers")
    run = run_stages(directory, "plan", _ui(as_json), changes=changes)
    shown = ("num_layers", "replaced_layers", "tap", "select", "method", "ranks", "goal", "scores")
    facts = {k: run.manifest[k] for k in shown}
    return _show(facts, scores_table(run.manifest), as_json)


@app.command()
def rewrite(directory: Run, layers: Layers = None, precision: Precision = None, decoder_source: Source = None) -> None:
    """Build the decoder graph and write its NBL version."""
    from nbl_export.pipeline import run_stages

    changes = _options(layers=layers, precision=precision, decoder_source=decoder_source)
    run_stages(directory, "rewrite", _ui(), changes=changes)
    print(directory / "model")


@app.command()
def verify(directory: Run, as_json: Json = False) -> None:
    """Hold the exported graphs to the torch models."""
    from nbl_export.inspection import rungs_table
    from nbl_export.pipeline import run_stages

    run = run_stages(directory, "verify", _ui(as_json))
    result = run.read_json("verify.json")
    _show(result, rungs_table(result), as_json)


@app.command()
def build(
    directory: Run,
    engine: Annotated[str | None, typer.Option(help="trt or trt-rtx (default: the engine of the run).")] = None,
    max_batch: MaxBatch = None,
    prefill_chunk: PrefillChunk = None,
    force: Force = False,
) -> None:
    """Compile both decoders, or compile them again on the machine that will run them."""
    from nbl_export.pipeline import run_stages

    changes = _options(engine=engine, max_batch=max_batch, prefill_chunk=prefill_chunk)
    run_stages(directory, "build", _ui(), changes=changes, force=force, needs="build")
    print(directory / "engine" / "model")


@app.command()
def bench(
    directory: Run,
    depth: Depth = None,
    repetitions: Repetitions = None,
    prompt_tokens: PromptTokens = None,
    generate_tokens: GenerateTokens = None,
    threads: Threads = None,
    seed: Seed = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure both decoders beside each other."""
    from nbl_export.inspection import speed_table
    from nbl_export.pipeline import run_stages

    changes = _options(
        depth=depth, repetitions=repetitions, prompt_tokens=prompt_tokens, generate_tokens=generate_tokens,
        threads=threads, seed=seed,
    )  # fmt: skip
    run = run_stages(directory, "report", _ui(as_json), changes=changes, force=force, needs="bench")
    result = run.read_json("report.json")
    _show(result, speed_table(result), as_json)


@app.command("eval")
def evaluate(
    directory: Run,
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
    force: Force = False,
    as_json: Json = False,
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
    _show(result, eval_table(result), as_json)


def _words(listed: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (listed or "").split(",") if word.strip())


@app.command("save-checkpoint")
def save_checkpoint(
    directory: Run,
    output: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="A new directory (default DIR/nbl-checkpoint).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on despite a failed verification.")] = False,
) -> None:
    """The NBL torch model as a Hugging Face directory: `import nbl_export.hf`, then AutoModelForCausalLM."""
    from nbl_export.torch_checkpoint import save

    print(save(directory, output, _ui(), force=force))


@app.command()
def report(directory: Run, force: Force = False) -> None:
    """Write report.html, report.md and report.json."""
    from nbl_export.pipeline import run_stages

    run_stages(directory, "report", _ui(), force=force)
    print(directory / "report.html")


@app.command()
def generate(
    directory: Run,
    prompt: Annotated[str, typer.Argument(help="What to continue or answer.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    original: Annotated[bool, typer.Option("--original", help="Use the original decoder instead.")] = False,
    force: Force = False,
) -> None:
    """Stream an answer from the exported decoder (a run directory, or a model directory by itself)."""
    from nbl_export.serving import open_for_text

    with open_for_text(directory, original=original, force=force) as runner:
        for piece in runner.stream(runner.encode(prompt, chat=not raw), max_new_tokens):
            print(piece, end="", flush=True)
    print()


@app.command()
def inspect(directory: Run, as_json: Json = False) -> None:
    """Show plan, graphs, caches and sizes of a run directory."""
    from nbl_export.inspection import describe, describe_table

    facts = describe(directory)
    _show(facts, describe_table(facts), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which engines work on this machine, and why the others do not."""
    from nbl_export.inspection import doctor_table, examine_engines

    found = examine_engines()
    _show(found, doctor_table(found), as_json)


def _show(value: Any, table: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(value, indent=1))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 110).print(table)


_INTERRUPTED = 130
_GOES_ON = "interrupted; finished stages are kept, the same command goes on from there"


class _Interrupts:
    """Signals that end the run: KeyboardInterrupt, and a note of it for where a library makes another error of that.

    An extension module whose import is interrupted says ImportError, and looks as if it were not installed.
    """

    def __init__(self) -> None:
        self.seen = False
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
            signal.signal(signal.SIGINT, self._raise)

    def _raise(self, _signal: int, _frame: Any) -> None:
        self.seen = True
        raise KeyboardInterrupt


def main() -> None:
    """Run the command line and exit."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress, not the libraries'
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # deprecations inside libraries are not the user's to act on
    interrupts = _Interrupts()
    try:
        status = app(prog_name="nbl-export", standalone_mode=False)
        if status == _INTERRUPTED:  # typer has caught it
            raise KeyboardInterrupt
        sys.exit(status if isinstance(status, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        _fail(_GOES_ON, _INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if interrupts.seen:
            _fail(_GOES_ON, _INTERRUPTED)
        _explain(error)


def _explain(error: Exception) -> None:
    """What the user can act on ends as one line; anything else is a defect and shows."""
    logging.getLogger(__name__).debug("where it happened", exc_info=error)
    usage = getattr(error, "format_message", None)
    if isinstance(error, NblError):
        _fail(str(error), error.exit_code)
    if usage is not None:
        _fail(f"{usage().rstrip('.')}; see nbl-export --help", int(getattr(error, "exit_code", 2)))
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # the latter is torch's
        _fail("out of memory; use a smaller --context, or a machine with more memory", 1)
    if isinstance(error, OSError) and error.strerror:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, 1)
    if isinstance(error, ValueError):
        _fail(str(error), 1)
    raise error


def _fail(message: str, status: int) -> None:
    print(f"nbl-export: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
