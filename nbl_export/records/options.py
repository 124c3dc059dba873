"""The options of a job, resolved."""

from __future__ import annotations

import dataclasses
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.records.from_json import read_record, require
from nbl_export.records.option import MAIN, option, options_of
from nbl_export.records.plan import MAPS, TAPS
from nbl_export.records.proposers import DRAFTS

__all__ = ["DTYPES", "FITS", "OF_CALIBRATE", "SELECTS", "SELF", "JobOptions", "describe_command", "usual_tap"]

# Source of the maps: closed form for each layer; joint training from there; zero, which drops attention; or an NBL
# checkpoint.
FITS = ("independent", "distilled", "drop", "given")
# How layers are ranked: smallest CCA bound, smallest relative error, least quality loss, least loss for the work saved.
SELECTS = ("cca", "error", "greedy", "efficient")
DTYPES = ("auto", "float32", "bfloat16")  # of products while calibrating and choosing layers
METHODS = ("rtn", "awq")  # of rounding to int4
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # ends a line, or moves a terminal's cursor
SELF = "self"  # calibration text that the model generates

_REPLACED, _DISTILL, _CALIBRATE, _ENGINE, _BENCH = (
    "What is replaced", "Distillation", "Calibration", "Engine", "Benchmark",
)  # fmt: skip
OF_CALIBRATE = ("calibration", "calibration_tokens", "context", "tap", "compute_dtype", "seed", "shard")


@dataclass(frozen=True)
class JobOptions:
    """All options of the main job, resolved. nbl.json records these options, and a resumed run reads them.

    None stands for a default that depends on other options or on the model. The help of a field states the default.
    """

    model: str
    engine: str = option(
        "ort", "ort (ONNX Runtime), openvino, trt (TensorRT) or trt-rtx (TensorRT for RTX).", _ENGINE,
        "main build", first=True, metavar="ENGINE",
    )  # fmt: skip
    layers: str | None = option(
        None, 'How many layers ("8") or which ("0,7,24-29"); default: perplexity +10% at most.', _REPLACED,
        "main plan rewrite", first=True, metavar="LAYERS",
    )  # fmt: skip
    max_perplexity_increase: str | None = option(
        None, "As many layers as stay within this on text that did not choose them.", _REPLACED,
        "main plan", first=True, metavar="5%",
    )  # fmt: skip
    target_speedup: str | None = option(
        None, "Modelled speedup to reach: 1.3 or 1.3@decode.", _REPLACED, "main plan",
        first=True, metavar="FACTOR",
    )  # fmt: skip
    kv_budget: str | None = option(
        None, "As few layers as make the KV cache fit: 64MiB@4096, or 15KiB for each token.", _REPLACED, "main plan",
        first=True, metavar="SIZE",
    )  # fmt: skip
    fit: str = option(
        "independent", "independent (closed form, default), distilled (trained), or drop (leave attention out).",
        _REPLACED, "main plan", first=True, metavar="FIT",
    )  # fmt: skip
    select: str | None = option(
        None, "Order of layers: efficient (least quality lost for the work saved, default), greedy (least quality "
        "lost; default for a limit on quality), cca (smallest bound; default if the model does not fit into memory) "
        "or error.", _REPLACED,
        "main plan", metavar="ORDER",
    )  # fmt: skip
    rank: str | None = option(
        None, "Rank of the maps: a number, or auto; default: full maps.", _REPLACED, "main plan", metavar="RANK"
    )
    tap: str = option(
        "residual", "What a map is applied to: residual (default) or normed (default of --fit distilled).", _REPLACED,
        "main calibrate plan", metavar="TAP",
    )  # fmt: skip
    maps: str = option(
        "affine", "affine (matrix and bias, default), or linear (matrix alone on the normed input, as llama.cpp and "
        "Nemotron-NAS checkpoints need).", _REPLACED, "main plan", metavar="KIND",
    )  # fmt: skip
    token_table: bool = option(True, "Replace leading linearized layers by a per-token lookup table.", _REPLACED, "")
    distill_minutes: float | None = option(
        None, "Stop --fit distilled after this many minutes.", _DISTILL, first=True, metavar="MINUTES"
    )
    distill_steps: int | None = option(
        None, "Training steps of --fit distilled; default 320.", _DISTILL, least=1, metavar="N"
    )
    distill_tokens: int = option(
        262_144, "Tokens of the text that --fit distilled trains on, from its beginning.", _DISTILL, least=1,
        metavar="N",
    )  # fmt: skip
    lora_rank: int = option(
        16, "Rank of the delta that --fit distilled trains on each map.", _DISTILL, least=1, metavar="N"
    )
    label_weight: float = option(
        0.1, "Share of the text's own next tokens in the loss of --fit distilled.", _DISTILL, least=0, most=1,
        metavar="SHARE",
    )  # fmt: skip
    calibration: tuple[str, ...] = option(
        (), "File (.txt, .jsonl, .json, .gz) or hub dataset (org/name@split; default: three); repeat to mix. "
        '"self": what the model itself says.', _CALIBRATE, "main calibrate", first=True,
        metavar="TEXT[:WEIGHT]",
    )  # fmt: skip
    calibration_tokens: int = option(
        65_536, "Tokens to calibrate on.", _CALIBRATE, "main calibrate", least=1, metavar="N"
    )
    context: int = option(512, "Length of a window in tokens.", _CALIBRATE, "main calibrate", least=2, metavar="N")
    compute_dtype: str = option(
        "auto", "Products while calibrating and choosing layers: float32, bfloat16, or auto (default; bfloat16 if the "
        "processor has it).", _CALIBRATE, "main calibrate", metavar="DTYPE",
    )  # fmt: skip
    seed: int = option(
        0, "Seed of distillation and of --calibration self.", _CALIBRATE, "main calibrate", least=0, metavar="N"
    )
    shard: str | None = option(
        None, "Only part I of N; `nbl-export merge` puts them together.", _CALIBRATE, "calibrate", metavar="I/N"
    )
    precision: str = option(
        "fp32", "ort: fp32 (default), fp16, int8, int4, gguf; openvino: fp16 (default), fp32, int8, int4; "
        "trt: fp16 (default), bf16 (if fp16 overflows), int4.", _ENGINE,
        "main rewrite", first=True, metavar="PRECISION",
    )  # fmt: skip
    requantize: bool = option(
        False, "A GGUF in int8 or int4: round its matrices again; default: take over its own codes (precision gguf).",
        _ENGINE, "main rewrite",
    )  # fmt: skip
    provider: str = option(
        "cpu", "ort: for cpu (default), cuda or nv-tensorrt-rtx.", _ENGINE, first=True,
        metavar="PROVIDER",
    )  # fmt: skip
    max_seq_len: int | None = option(
        None, "trt, trt-rtx: most tokens of a sequence; default 2048.", _ENGINE, first=True, least=1,
        metavar="N",
    )  # fmt: skip
    max_batch: int | None = option(
        None, "trt, trt-rtx: most sequences at once; default 1.", _ENGINE, "main build", least=1, metavar="N"
    )
    prefill_chunk: int | None = option(
        None, "trt, trt-rtx: tokens of a prefill step; default 512.", _ENGINE, "main build", least=1, metavar="N"
    )
    logits: str | None = option(
        None, "Logits of the last token (default), as generation needs, or all.", _ENGINE, metavar="last|all"
    )
    decoder_source: str = option(
        "genai", "What exports the decoder graph; ort: genai (default) or mobius; openvino: openvino; "
        "trt, trt-rtx: static.", _ENGINE,
        "main rewrite", metavar="SOURCE",
    )  # fmt: skip
    builder_option: tuple[str, ...] = option(
        (), "How the GenAI builder quantises: algo_config, block_size, accuracy_level, shared_embeddings, "
        "fuse_mlp_gate_up; repeat for more.", _ENGINE, "main rewrite", metavar="KEY=VALUE",
    )  # fmt: skip
    quantize: str | None = option(
        None, "ort, int4: awq moves scales from activations into matrices before they are rounded (default: rtn, "
        "rounding alone).", _ENGINE, "main rewrite", metavar="METHOD",
    )  # fmt: skip
    quantized_model: str | None = option(
        None, "int4: use the codes of this checkpoint of the same model (GPTQ, AWQ or Olive).", _ENGINE,
        "main rewrite", metavar="MODEL",
    )  # fmt: skip
    draft: str | None = option(
        None, "ort, openvino: also write lossless/, the original that decides over proposed tokens; they come from "
        "ngram (the text so far), int4 (the original in int4), nbl (the NBL model in int4), or the fastest (auto).",
        _ENGINE,
        metavar="DRAFT",
    )  # fmt: skip
    draft_layers: str | None = option(
        None, "How many or which layers the nbl draft replaces; default: those of the NBL model.", _ENGINE,
        metavar="LAYERS",
    )  # fmt: skip
    depths: tuple[int, ...] = option(
        (0, 2048), "Tokens already in the cache; default 0,2048.", _BENCH, "bench", flag="depth", numbers="0,2048",
        least=0, metavar="N,...",
    )  # fmt: skip
    repetitions: int | None = option(
        None, "Measured rounds, each on decoders loaded anew; default: 6, or up to 24 in 3 minutes while an interval "
        "is wider than 10%.", _BENCH, "bench profile", least=1, metavar="N",
    )  # fmt: skip
    prompt_tokens: tuple[int, ...] = option(
        (512,), "Lengths of the prefill test; default 512.", _BENCH, "bench profile", numbers="128,512", least=1,
        metavar="N,...",
    )  # fmt: skip
    generate_tokens: int | None = option(
        None, "Length of the decode test; default: 128, fewer for a large model on a CPU.", _BENCH, "bench", least=1,
        metavar="N",
    )  # fmt: skip
    threads: tuple[int, ...] | None = option(
        None, "Threads of the engine; several make a sweep. Default: the engine's choice.", _BENCH, "bench profile",
        numbers="1,2", least=1, metavar="N,...",
    )  # fmt: skip
    batches: tuple[int, ...] = option(
        (1,), "ort: sequences side by side; default 1.", _BENCH, "bench", flag="batch", numbers="1,4", least=1,
        metavar="N,...",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, said in options_of(JobOptions).items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            low, high = said.least, said.most
            require(all(low is None or v >= low for v in numbers), f"{name} must be at least {low}")
            require(all(high is None or v <= high for v in numbers), f"--{name.replace('_', '-')} is {high} at most")
            require(not said.numbers or value is None or len(numbers) > 0, f"{name} needs a number")
        for name, value in dataclasses.asdict(self).items():
            texts = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str)]
            require(not any(map(_CONTROL.search, texts)), f"{name} is not one line of text")
        require(self.tap in TAPS, f"--tap is {' or '.join(TAPS)}, not {self.tap!r}")
        require(self.maps in MAPS, f"--maps is {' or '.join(MAPS)}, not {self.maps!r}")
        require(self.compute_dtype in DTYPES, f"--compute-dtype is {', '.join(DTYPES)}, not {self.compute_dtype!r}")
        require(self.select in (None, *SELECTS), f"--select is {', '.join(SELECTS)}, not {self.select!r}")
        require(self.fit in FITS, f"--fit is {', '.join(FITS[:3])}, not {self.fit!r}")
        require(self.quantize in (None, *METHODS), f"--quantize is {', '.join(METHODS)}, not {self.quantize!r}")
        require(self.draft in (None, *DRAFTS), f"--draft is {', '.join(DRAFTS)}, not {self.draft!r}")
        alone = SELF not in self.calibration or self.calibration == (SELF,)
        require(alone, "--calibration self reads no text: give it alone (a file of that name is ./self)")
        require((self.distill_minutes or 1) > 0, "--distill-minutes is more than 0")
        require(self.logits in (None, "last", "all"), f"logits are of the last token or all, not {self.logits!r}")

    @property
    def has_bias(self) -> bool:
        """Whether maps are fitted with a bias."""
        return self.maps == "affine"

    @property
    def kept_logits(self) -> str:
        """Positions whose logits the graphs give: each row's "last" valid one, which generation reads, or "all"."""
        return self.logits or "last"

    @property
    def says_itself(self) -> bool:
        """Whether calibration uses text that the model generates."""
        return self.calibration == (SELF,)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prefill whose costs are modelled: the first measured length."""
        return self.prompt_tokens[0]

    @property
    def first_threads(self) -> int | None:
        """Threads of lossless decoding and of a profile; None is the engine's choice."""
        return self.threads[0] if self.threads else None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobOptions:
        """Read options; keys that are no option are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return read_record(cls, {k: v for k, v in values.items() if k in known})

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def usual_tap(fit: str, maps: str) -> str:
    """The tap if none is asked for."""
    return "normed" if fit == "distilled" or maps == "linear" else "residual"


def describe_command(options: JobOptions, output: Path) -> str:
    """The command line that repeats this run; defaults are left out."""
    first, later = ("calibrate", ()) if options.shard else (MAIN, ("bench",))
    words = ["nbl-export", *([first] if options.shard else []), "--model", options.model]
    words += ["--engine", options.engine] if first == MAIN else []
    command = shlex.join([*words, *_flags(options, first, {"engine"}), "--output", str(output)])
    for name in later:
        asked = _flags(options, name, {n for n, said in options_of(JobOptions).items() if first in said.commands})
        command += f" && {shlex.join(['nbl-export', name, str(output), *asked])}" if asked else ""
    return command


def _flags(options: JobOptions, command: str, without: set[str]) -> list[str]:
    words = []
    defaults = {f.name: f.default for f in dataclasses.fields(JobOptions)}
    if options.tap != usual_tap(options.fit, options.maps):
        del defaults["tap"]
    if (options.engine, options.provider) != (defaults["engine"], defaults["provider"]):
        del defaults["precision"]  # the default is the engine's own
    for name, said in options_of(JobOptions).items():
        value = getattr(options, name)
        if command not in said.commands or name in without or (name in defaults and value == defaults[name]):
            continue
        flag = f"--{(said.flag or name).replace('_', '-')}"
        if isinstance(value, tuple) and not said.numbers:
            words += [word for item in value for word in (flag, item)]
        elif value is True:
            words.append(flag)
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words
