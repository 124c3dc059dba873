"""Options that several commands take, and how they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Against",
    "Batch",
    "BuilderOption",
    "Calibration",
    "CalibrationTokens",
    "Context",
    "DataFree",
    "Decoders",
    "Depth",
    "DistillDtype",
    "DistillMinutes",
    "DistillSteps",
    "DistillTokens",
    "Engine",
    "Fit",
    "Force",
    "Format",
    "GenerateTokens",
    "Json",
    "KvBudget",
    "LabelWeight",
    "LayerWise",
    "Layers",
    "Logits",
    "LoraRank",
    "MapBits",
    "Maps",
    "MaxBatch",
    "MaxIncrease",
    "MaxSeqLen",
    "MaybeRun",
    "Method",
    "Onnx",
    "Precision",
    "PrefillChunk",
    "Profile",
    "PromptTokens",
    "Provider",
    "Rank",
    "Repetitions",
    "ResultFile",
    "Run",
    "Seed",
    "Select",
    "Source",
    "Tap",
    "TargetSpeedup",
    "Threads",
    "TokenTable",
    "given_options",
    "refuse_options_before",
    "refuse_with",
]

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run directory made by nbl-export --output.")]
MaybeRun = Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A run directory made by nbl-export --output.")]
Onnx = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR|FILE", help="A decoder graph from any exporter, to be rewritten with --maps to --output."
    ),
]
Maps = Annotated[Path | None, typer.Option(metavar="FILE", help="--onnx: the maps.safetensors of a run.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout.")]
Layers = Annotated[
    str | None,
    typer.Option(
        help='How many ("8": chosen by --select) or which ("0,7,24-29"); default a quarter of them, which raises '
        "SmolLM2-135M's perplexity by 38% on Python's documentation."
    ),
]
MaxIncrease = Annotated[
    str | None,
    typer.Option(
        "--max-perplexity-increase",
        help="As many layers as are shown to keep to it on text that did not choose them: 5%.",
    ),
]
TargetSpeedup = Annotated[
    str | None, typer.Option(help="As few layers as bring this modelled speed-up: 1.3 (of prefill) or 1.3@decode.")
]
KvBudget = Annotated[
    str | None, typer.Option(help="As few layers as make the KV cache fit: 64MiB@4096, or 15KiB for each token.")
]
Select = Annotated[
    str | None,
    typer.Option(
        help="Which layers go first: efficient (least lost in the output for the prefill work saved, default), greedy "
        "(least lost for each), cca (smallest bound; default where the model does not fit into memory) or error."
    ),
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
BuilderOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="--decoder-source genai: how the GenAI builder quantises (algo_config, block_size, "
        "accuracy_level, shared_embeddings, fuse_mlp_gate_up); again for more.",
    ),
]
QuantizedModel = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="int4: codes of this checkpoint of the same model, quantised by GPTQ, AWQ or Olive (hub id or directory).",
    ),
]
MapBits = Annotated[
    int | None, typer.Option(help="int8, int4: bits of the maps (4, 8, or 32: float32; default as the other matrices).")
]
TokenTable = Annotated[
    bool | None,
    typer.Option(
        "--token-table/--no-token-table",
        help="Look up what replaced layers below the first kept one make of a token (default), or compute it.",
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
DistillSteps = Annotated[int | None, typer.Option(min=1, help="Training steps of --fit distilled (default 320).")]
DistillMinutes = Annotated[float | None, typer.Option(help="Stop --fit distilled after so many minutes.")]
DistillTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of the text that --fit distilled trains on, its beginning (default 262144)."),
]
DistillDtype = Annotated[str | None, typer.Option(help="Products of --fit distilled: auto (default), fp32 or bf16.")]
LoraRank = Annotated[
    int | None,
    typer.Option(min=0, help="--fit distilled: rank of the delta trained on each map (default 16; 0: whole matrices)."),
]
LabelWeight = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="--fit distilled: share of the text's own next tokens in what is learned (default 0.1)."
    ),
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
Batch = Annotated[str | None, typer.Option(help="ort: sequences side by side, comma separated (default 1).")]
Decoders = Annotated[
    list[Path],
    typer.Argument(metavar="DIR ...", help="Run directories (their model/), or deployable GenAI model directories."),
]
Against = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="What they are held against (default: original/ of the first run directory)."),
]
Profile = Annotated[bool, typer.Option("--profile", help="Time of each operator, by ONNX Runtime's own profile.")]
Format = Annotated[
    str | None, typer.Option("--format", help="table (default), md, csv, json or llama-bench; no stage of a run.")
]
ResultFile = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write there; .md, .csv and .json say the format.")
]
Depth = Annotated[str | None, typer.Option(help="Tokens already in the cache, comma separated (default 0,2048).")]
Repetitions = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Measured rounds, each on decoders loaded anew "
        "(default: 6, or up to 24 in 3 minutes while an interval is wider than 10%).",
    ),
]
PromptTokens = Annotated[str | None, typer.Option(help="pp test lengths, comma separated (default 512).")]
GenerateTokens = Annotated[int | None, typer.Option(min=1, help="tg test length (default 128).")]
Threads = Annotated[
    str | None, typer.Option(help="Engine threads, comma separated for a sweep (default: the engine's choice).")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of the benchmark's token ids (default 0).")]
Force = Annotated[bool, typer.Option("--force", help="Start over, or go on despite a failed verification.")]


def given_options(**given: Any) -> dict[str, Any]:
    """Drop what was not given; read the lists of numbers."""
    chosen = {k: v for k, v in given.items() if v not in (None, [])}
    for name in ("calibration", "builder_option"):
        if name in chosen:
            chosen[name] = tuple(chosen[name])
    for option, (name, least, example) in _LISTS.items():
        if option in chosen:
            chosen[name] = _numbers(str(chosen.pop(option)), f"--{option.replace('_', '-')}", least, example)
    return chosen


# option -> its name in JobOptions, the least number, an example
_LISTS = {
    "depth": ("depths", 0, "0,2048"),
    "prompt_tokens": ("prompt_tokens", 1, "128,512"),
    "threads": ("threads", 1, "1,2"),
    "batch": ("batches", 1, "1,4"),
}


def _numbers(text: str, flag: str, least: int, example: str) -> tuple[int, ...]:
    """Distinct numbers, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        raise typer.BadParameter(f"write numbers from {least} on, comma separated ({example})", param_hint=flag)
    return tuple(dict.fromkeys(int(part) for part in parts))


def refuse_with(present: str | None, absent: str | None, **given: Any) -> None:
    """Options that are without effect beside `present`, or without `absent`."""
    for name, value in given.items():
        if value is not None:
            why = f"does not go with {present}" if present else f"goes with {absent}"
            raise typer.BadParameter(why, param_hint="DIR" if name == "dir" else f"--{name.replace('_', '-')}")


def refuse_options_before(context: typer.Context) -> None:
    """Options of the main job in front of a subcommand would be without effect."""
    for name in set(context.params) - {"verbose", "version"}:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"goes after {context.invoked_subcommand}, if it takes it", param_hint=flag)
