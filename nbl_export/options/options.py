"""The options of a job: one field each, with all that is said of it (`option.Option`).

The command line, Python's arguments, docs/usage.md, `--config FILE`, nbl.json and the command that repeats a run are
made from the fields. `settle` settles them, and `rules` refuses values that do not go together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nbl_export.options.option import Applies, ModelFacts, Option, option
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.destinations import ANYWHERE, DESTINATIONS, Destination
from nbl_export.records.from_json import read_record, require
from nbl_export.records.plan import MAPS, PREDICTED_KV, TAPS, USUAL_KIND

__all__ = [
    "AUTO_EXIT",
    "BUILDER_OPTIONS",
    "CHECKPOINT_FIT",
    "DEFAULTS",
    "DEFAULT_SLOTS",
    "GPU_DECODE",
    "NO_EXIT",
    "NO_ORIGINAL",
    "OPTIONS",
    "PANELS",
    "RENAMED",
    "JobOptions",
    "exit_refused",
    "flag_of",
    "keeps_blocks",
    "renamed",
]

# Source of the maps: closed form for each layer; joint training from there; zero, which drops attention; or an NBL
# checkpoint.
FITS = ("independent", "distilled", "drop", "given")
SELECTS = ("cca", "efficient")  # how layers are ranked: smallest CCA bound, least quality loss for the work saved
DTYPES = ("auto", "float32", "bfloat16")  # of products while calibrating and choosing layers
DEVICES = ("auto", "cpu", "cuda")  # of torch
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # ends a line, or moves a terminal's cursor
_STATIC = "static"  # decoder source whose caches have a fixed length
DEFAULT_SLOTS = 2048  # slots of a compiled engine, and tokens of the decode test on a GPU
GPU_DECODE = 128
SMALLEST = "int4"  # precision
AUTO_EXIT = "auto"  # the deepest exit layer that quality allows, or no exit layer
NO_EXIT = "none"
RECENT_TOKENS = (64, 128, 256)  # tokens at the end of a prompt that continue above an exit layer, if none is asked for
CHECKPOINT_FIT = "given"  # fit of the maps that an NBL checkpoint has
NO_ORIGINAL = "the checkpoint no longer contains the attention weights of its replaced layers"
# How the GenAI builder quantises, by its own names (`--extra_options` of onnxruntime_genai.models.builder). The values
# are limited to graphs that can be rewritten and verified. is_symmetric=false is left out: the builder (0.18) then
# gives a tied embedding float32 where it declares uint8. k_quant has zero points too, and is correct.
INT4_ALGORITHM = "k_quant_mixed"  # bench/results/int4-methods-smollm2.json
_ALGORITHMS = ("default", "rtn", "k_quant", "rtn_last", "k_quant_last", INT4_ALGORITHM)
BUILDER_OPTIONS: dict[str, tuple[str, ...]] = {
    "accuracy_level": ("1", "2", "3", "4"),  # of activations: 1 float32, 4 int8
    "algo_config": _ALGORITHMS,
    "block_size": ("16", "32", "64", "128", "256"),
    "fuse_mlp_gate_up": ("true", "false"),  # one product for both
    "shared_embeddings": ("true", "false"),  # embedding and lm_head as one quantised matrix, where the model ties them
}

PANELS = ("What is replaced", "Distillation", "Calibration", "Torch", "Engine", "Benchmark")
_REPLACED, _DISTILL, _CALIBRATE, _TORCH, _ENGINE, _BENCH = PANELS

# -- usual values, and when options have an effect ------------------------------------------------------------------

_FP16 = "graphs of mobius in fp16 write attention in many nodes; choose another --precision"
# The builder reads these for MatMulNBits alone (onnxruntime_genai 0.18, models/builder.py).
OF_ROUNDING = ("accuracy_level", "algo_config", "block_size")


def _usual_fit(values: Mapping[str, Any], engine: Capabilities | None, model: ModelFacts) -> str:
    """Maps are trained where keys are not predicted; large models need closed form."""
    closed = values["exit_layer"] != NO_EXIT or not model.fits
    if model.maps_tap:
        return CHECKPOINT_FIT
    if not closed and (values["distill_minutes"] or values["distill_steps"]):
        return "distilled"  # whoever says how long asks for it
    if engine is None and not closed:
        return ""  # it depends on the engine and the model, so that a command states it
    return "independent" if closed or _takes_exit(values, engine, model) or values["select"] == "cca" else "distilled"


def _usual_exit(values: Mapping[str, Any], engine: Capabilities | None, model: ModelFacts) -> str:
    """The deepest exit layer for a limit on quality, unless another option asks for layers that are replaced."""
    others = ("layers", "select", "distill_minutes", "distill_steps")
    asks = any(values[name] for name in others) or values["fit"] != "independent" or values["maps"] != "affine"
    asks |= values["logits"] == "all"
    lacks = not _takes_exit(values, engine, model) or bool(model.maps_tap) or not model.fits
    return NO_EXIT if asks or lacks else AUTO_EXIT


def _usual_depths(values: Mapping[str, Any], _engine: Capabilities | None, model: ModelFacts) -> tuple[int, ...]:
    """Empty and behind 2,048 tokens, or as many as leave room for the longest test that the slots of an engine hold."""
    if values["exit_layer"] != NO_EXIT:
        return (0,)
    if values["decoder_source"] != _STATIC:
        return (0, 2048)
    slots = values["max_seq_len"] or min(DEFAULT_SLOTS, model.decoder.max_positions if model.decoder else DEFAULT_SLOTS)
    tests = (*values["prompt_tokens"], values["generate_tokens"] or GPU_DECODE)
    room = slots - max((n for n in tests if n <= slots), default=slots)
    return (0, min(2048, room)) if room else (0,)


def _takes_exit(values: Mapping[str, Any], engine: Capabilities | None, model: ModelFacts) -> bool:
    """Whether keys of the model can be predicted where it is served, as far as engine and model are known."""
    place = _place(values)
    held = place.kinds is None or PREDICTED_KV in place.kinds
    refused = exit_refused(values["decoder_source"], values["precision"], model, values["destination"])
    return held and (engine is None or engine.holds(PREDICTED_KV)) and not refused


def _place(values: Mapping[str, Any]) -> Destination:
    """The destination of `--for`."""
    return DESTINATIONS.get(values["destination"], ANYWHERE)


def _sources(engine: Capabilities, model: ModelFacts, precision: str = "") -> list[str]:
    """Decoder sources that export the model, in a precision if one is given; the usual source first."""
    found = engine.sources.items()
    return [name for name, made in found if name not in model.not_from and (not precision or precision in made)]


def _usual_precision(values: Mapping[str, Any], engine: Capabilities | None, model: ModelFacts) -> str:
    """int4, which is rounded one matrix after the other, for a model that does not fit into memory in float32."""
    if engine is None:  # a command states another engine's
        return "int8" if (values["engine"], values["provider"]) == ("ort", "cpu") else ""
    asked = values["decoder_source"]
    possible = _sources(engine, model, SMALLEST)
    rounds = SMALLEST in engine.rounded and (asked in possible or (possible and asked not in engine.sources))
    return SMALLEST if rounds and not model.fits else engine.precisions[0]


def _usual_source(values: Mapping[str, Any], engine: Capabilities | None, model: ModelFacts) -> str:
    """The first source that exports the model in its precision, else the first that exports it at all."""
    if engine is None:  # for a command, which states what does not follow from engine and precision
        asked = str(values["decoder_source"])
        return "genai" if asked == "mobius" and values["precision"] != "fp16" else asked
    return next(iter((*_sources(engine, model, values["precision"]), *_sources(engine, model), engine.source)))


def exit_refused(source: str, precision: str, model: ModelFacts, destination: str | None = None) -> str:
    """Why a model takes no exit layer in graphs of a decoder source, or where it is served; "" if it does.

    What is not known of the model is no reason.
    """
    elsewhere = model.no_exit.get(destination or "", "")
    return elsewhere or model.no_exit.get(source, _FP16 if (source, precision) == ("mobius", "fp16") else "")


def keeps_blocks(builder_options: Iterable[str]) -> bool:
    """Whether some ask for the GenAI builder's own rounding, in blocks of weights."""
    return any(option.partition("=")[0] in OF_ROUNDING for option in builder_options)


def _usual_tap(values: Mapping[str, Any], _engine: Capabilities | None, model: ModelFacts) -> str:
    wanted = "normed" if values["fit"] == "distilled" or values["maps"] == "linear" else "residual"
    return model.maps_tap or (wanted if wanted in model.taps else model.taps[0])


_ORIGINAL = (
    Applies("the original model; this NBL checkpoint no longer contains the removed attention", lambda c: not c.is_nbl),
)
_ORDERED = (
    *_ORIGINAL, Applies("a number of layers or a goal; --layers names the layers here", lambda c: not c.is_named),
)  # fmt: skip
_FITTED = (*_ORIGINAL, Applies("fitted maps (--fit independent or distilled)", lambda c: c.options.fit != "drop"))
_TRAINED = (Applies("--fit distilled", lambda c: c.options.fit == "distilled"),)
_PREDICTING = (
    Applies("engines whose decoders hold predicted KV, and the original model",
            lambda c: c.options.exit_layer == NO_EXIT or (c.engine.holds(PREDICTED_KV) and not c.is_nbl)),
)  # fmt: skip
_OF_EXIT = (Applies("--exit-layer", lambda c: c.options.exit_layer != NO_EXIT),)
_ORT = (Applies("--engine ort", lambda c: bool(c.engine.providers)),)
_COMPILED = (Applies("engines that compile graphs (trt, trt-rtx)", lambda c: c.engine.static),)
_NOT_COMPILED = (Applies("engines that compile nothing (ort, openvino)", lambda c: not c.engine.static),)
_INT4 = (
    Applies(
        "--precision int4 of decoder_source genai",
        lambda c: c.options.precision == "int4" and c.options.decoder_source == "genai",
    ),
)
_BUILT = (
    Applies("decoder_source genai", lambda c: c.options.decoder_source == "genai"),
    Applies(f"--precision int8 or int4 ({', '.join(OF_ROUNDING)})",
            lambda c: c.options.precision in ("int8", "int4") or not keeps_blocks(c.options.builder_options)),
)  # fmt: skip


@dataclass(frozen=True)
class JobOptions:
    """All options of the main job, resolved. nbl.json records these options, and a resumed run reads them.

    None stands for a default that depends on other options or on the model. The help of a field states the default.
    A field of which others make their usual value stands before them.
    """

    model: str
    destination: str | None = option(
        None,
        f"Where the result is served: {', '.join(DESTINATIONS)}. Sets engine and kinds of layers.",
        _ENGINE,
        first=True,
        flag="for",
        metavar="DESTINATION",
        choices=tuple(DESTINATIONS),
    )
    engine: str = option(
        "ort",
        "ort (default), openvino, trt or trt-rtx (TensorRT).",
        _ENGINE,
        "main build",
        first=True,
        metavar="ENGINE",
        usual=lambda values, *_: _place(values).engine or "ort",
    )
    provider: str = option(
        "cpu",
        "ort: for cpu (default) or cuda.",
        _ENGINE,
        first=True,
        metavar="PROVIDER",
        applies=_ORT,
        usual=lambda values, *_: _place(values).provider,
    )
    precision: str = option(
        "int8",
        "ort: int8 (default; on a CPU also of activations), fp32, fp16, int4; openvino: int8 (default), fp16, fp32, "
        "int4; trt, trt-rtx: bf16 (default), fp16, int4. ort, openvino: int4 is the default if float32 does not fit "
        "into memory.",
        _ENGINE,
        "main rewrite",
        first=True,
        metavar="PRECISION",
        usual=_usual_precision,
    )
    decoder_source: str = option(
        "genai",
        "What exports the decoder graph; ort: genai (default) or mobius (default if genai cannot); "
        "openvino: openvino; trt, trt-rtx: static.",
        _ENGINE,
        "main rewrite",
        metavar="SOURCE",
        usual=_usual_source,
        key=True,
    )
    layers: str | None = option(
        None,
        'How many layers ("8") or which ("0,7,24-29"); default: --exit-layer.',
        _REPLACED,
        "main plan rewrite",
        first=True,
        metavar="LAYERS",
        python="int layers",
        applies=_ORIGINAL,
    )
    max_perplexity_increase: str | None = option(
        None,
        "Most increase of perplexity on other text.",
        _REPLACED,
        "main plan",
        first=True,
        metavar="5%",
        applies=_ORIGINAL,
        python="share",
    )
    exit_layer: str = option(
        NO_EXIT,
        "Exit layer: most tokens of a prompt skip it and those above (20); auto (the default, where "
        "it is possible): by quality; or none.",
        _REPLACED,
        "main plan",
        first=True,
        metavar="LAYER",
        python="int",
        usual=_usual_exit,
        applies=_PREDICTING,
    )
    recent_tokens: int | None = option(
        None,
        "Tokens at the end of a prompt that pass all layers; default: 64, or with --exit-layer auto 64, 128 or 256.",
        _REPLACED,
        "main plan",
        least=1,
        applies=_OF_EXIT,
    )
    fit: str = option(
        "independent",
        "independent, distilled (trained; default with a limit, where keys are not predicted), or drop.",
        _REPLACED,
        "main plan",
        first=True,
        choices=FITS,
        metavar="FIT",
        usual=_usual_fit,
    )
    select: str | None = option(
        None,
        "Order: efficient (default), or the paper's cca.",
        _REPLACED,
        "main plan",
        choices=SELECTS,
        metavar="ORDER",
        applies=_ORDERED,
        key=True,
    )
    maps: str = option(
        "affine",
        "affine (matrix and bias, default), or linear (matrix alone on the normed input, as "
        "Nemotron-NAS checkpoints need).",
        _REPLACED,
        "main plan",
        choices=MAPS,
        metavar="KIND",
        applies=_FITTED,
        usual=lambda values, *_: "linear" if _place(values).bare and values["fit"] != "drop" else "affine",
        key=True,
    )
    tap: str = option(
        "residual",
        "What a map is applied to: residual (default) or normed (default of --fit distilled).",
        _REPLACED,
        "main calibrate plan",
        choices=TAPS,
        metavar="TAP",
        usual=_usual_tap,
        key=True,
    )
    distill_minutes: float | None = option(
        None, "Minutes of --fit distilled.", _DISTILL, first=True, metavar="MINUTES", applies=_TRAINED
    )
    distill_steps: int | None = option(
        None,
        "Training steps of --fit distilled; default 320 without minutes.",
        _DISTILL,
        least=1,
        applies=_TRAINED,
        key=True,
    )
    distill_tokens: int = option(
        262_144,
        "Tokens of the text that --fit distilled trains on, from its beginning.",
        _DISTILL,
        least=1,
        applies=_TRAINED,
        key=True,
    )
    lora_rank: int = option(
        16, "Rank of the delta that --fit distilled trains on each map.", _DISTILL, least=1, applies=_TRAINED, key=True
    )
    label_weight: float = option(
        0.1,
        "Share of the text's own next tokens in the loss of --fit distilled.",
        _DISTILL,
        least=0,
        most=1,
        metavar="SHARE",
        applies=_TRAINED,
        key=True,
    )
    calibration: tuple[str, ...] = option(
        (),
        "File or hub dataset (org/name@split); repeat to mix.",
        _CALIBRATE,
        "main calibrate",
        first=True,
        metavar="TEXT",
        python="list",
    )
    calibration_tokens: int = option(65_536, "Tokens to calibrate on.", _CALIBRATE, "main calibrate", least=1)
    context: int = option(512, "Length of a window in tokens.", _CALIBRATE, "main calibrate", least=2, key=True)
    compute_dtype: str = option(
        "auto",
        "Products while calibrating and choosing layers: float32, bfloat16, or auto (default; bfloat16 if the "
        "processor has it).",
        _TORCH,
        "main calibrate",
        choices=DTYPES,
        metavar="DTYPE",
        applies=_ORIGINAL,
        key=True,
    )
    device: str = option(
        "auto",
        "Where torch calibrates, chooses layers, trains and verifies: cpu, cuda (one GPU), or auto (default; "
        "the GPU if torch sees one and the work fits).",
        _TORCH,
        "main calibrate plan rewrite verify eval",
        choices=DEVICES,
        metavar="DEVICE",
    )
    seed: int = option(0, "Seed of distillation.", _DISTILL, least=0, applies=_TRAINED, key=True)
    max_seq_len: int | None = option(
        None, "trt, trt-rtx: most tokens of a sequence; default 2048.", _ENGINE, least=1, applies=_COMPILED
    )
    max_batch: int | None = option(
        None,
        "trt, trt-rtx: most sequences at once; default 1.",
        _ENGINE,
        "main build",
        least=1,
        applies=_COMPILED,
        key=True,
    )
    prefill_chunk: int | None = option(
        None,
        "trt, trt-rtx: tokens of a prefill step; default 512, or 2048 with --exit-layer.",
        _ENGINE,
        "main build",
        least=1,
        applies=_COMPILED,
        key=True,
    )
    logits: str | None = option(
        None,
        "Logits of the last token (default), as generation needs, or all.",
        _ENGINE,
        choices=("last", "all"),
        metavar="last|all",
        key=True,
    )
    builder_option: tuple[str, ...] = option(
        (),
        "How the GenAI builder quantises: algo_config (int4 on a CPU: k_quant_mixed), block_size, accuracy_level, "
        "shared_embeddings, fuse_mlp_gate_up; a list sets more.",
        _ENGINE,
        "main rewrite",
        metavar="KEY=VALUE",
        python="list",
        applies=_BUILT,
        key=True,
    )
    quantized_model: str | None = option(
        None,
        "int4: use the codes of this checkpoint of the same model (GPTQ, AWQ or Olive).",
        _ENGINE,
        "main rewrite",
        metavar="MODEL",
        applies=_INT4,
    )
    depths: tuple[int, ...] = option(
        (0, 2048),
        "Tokens already in the cache; default 0,2048, or 0 with --exit-layer; trt, trt-rtx: 0 and what fits "
        "--max-seq-len, at most 2048.",
        _BENCH,
        "main bench",
        flag="depth",
        numbers="0,2048",
        least=0,
        usual=_usual_depths,
    )
    repetitions: int | None = option(
        None,
        "Measured rounds, each on decoders loaded anew; default: 6, or up to 24 in 3 minutes while an interval "
        "is wider than 10%.",
        _BENCH,
        "main bench",
        least=1,
    )
    prompt_tokens: tuple[int, ...] = option(
        (512,),
        "Lengths of the prefill test; default 512, or 512,2048 with --exit-layer.",
        _BENCH,
        "main bench",
        numbers="128,512",
        least=1,
        usual=lambda values, _, __: (512,) if values["exit_layer"] == NO_EXIT else (512, 2048),
    )
    generate_tokens: int | None = option(
        None,
        "Length of the decode test; default: 128, fewer for a large model on a CPU.",
        _BENCH,
        "main bench",
        least=1,
    )
    threads: int | None = option(
        None,
        "Threads of the engine; default: its own choice.",
        _BENCH,
        "main bench",
        least=1,
        most=1024,
        applies=_NOT_COMPILED,
    )

    def __post_init__(self) -> None:
        for name, record in OPTIONS.items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
            low = record.least
            high = record.most
            require(all(low is None or v >= low for v in numbers), f"{name} must be at least {low}")
            require(all(high is None or v <= high for v in numbers), f"{flag_of(name)} is {high} at most")
            require(not record.numbers or value is None or len(numbers) > 0, f"{name} needs a number")
            known = record.choices[:3] if name == "fit" else record.choices  # nobody asks for given maps
            is_known = not record.choices or value is None or value in record.choices
            require(is_known, f"{flag_of(name)} is {(' or ' if len(known) == 2 else ', ').join(known)}, not {value!r}")
        for name, value in dataclasses.asdict(self).items():
            texts = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, str)]
            require(not any(map(_CONTROL.search, texts)), f"{name} is not one line of text")
        require(self.distill_minutes is None or self.distill_minutes > 0, "--distill-minutes is more than 0")

    @property
    def has_bias(self) -> bool:
        """Whether maps are fitted with a bias."""
        return self.maps == "affine"

    @property
    def builder_options(self) -> tuple[str, ...]:
        """What the GenAI builder is told: what is asked for, and the usual algorithm of int4 on a CPU."""
        usual = self.decoder_source == "genai" and self.precision == "int4" and self.provider == "cpu"
        chosen = self.quantized_model or any(word.startswith("algo_config=") for word in self.builder_option)
        return (*self.builder_option, f"algo_config={INT4_ALGORITHM}") if usual and not chosen else self.builder_option

    @property
    def kept_logits(self) -> str:
        """Positions whose logits the graphs give: each row's "last" valid one, which generation reads, or "all"."""
        return self.logits or "last"

    @property
    def prompt_length(self) -> int:
        """Tokens of the prefill whose costs are modelled: the first measured length."""
        return self.prompt_tokens[0]

    @property
    def predicts(self) -> bool:
        """Whether keys of upper layers are predicted."""
        return self.exit_layer != NO_EXIT

    @property
    def method(self) -> str:
        """Name of the method (`nbl_export.methods`)."""
        return PREDICTED_KV if self.predicts else USUAL_KIND

    @property
    def recent_choices(self) -> tuple[int, ...]:
        """Possible numbers of tokens that continue above an exit layer."""
        return (
            (self.recent_tokens,)
            if self.recent_tokens
            else RECENT_TOKENS
            if self.exit_layer == AUTO_EXIT
            else RECENT_TOKENS[:1]
        )

    def cache_length(self, decoder: DecoderSpec, *, compiled: bool) -> int:
        """Most tokens of a sequence: the model's positions, or the length of the caches of a compiled engine."""
        return (self.max_seq_len or min(DEFAULT_SLOTS, decoder.max_positions)) if compiled else decoder.max_positions

    def chunk(self, decoder: DecoderSpec) -> int:
        """Most prefill tokens in one step of a compiled engine."""
        return self.prefill_chunk or min(2048 if self.predicts else 512, self.cache_length(decoder, compiled=True))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobOptions:
        """Read options; keys that are no option are left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        return read_record(cls, {k: v for k, v in values.items() if k in known})

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in dataclasses.fields(JobOptions) if f.metadata}
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(JobOptions)}


def flag_of(name: str) -> str:
    """The option as the command line has it, or as `--config FILE` has it."""
    record = OPTIONS.get(name)
    if record and record.key:
        return f"key {name}"
    return f"--{((record.flag if record else '') or name).replace('_', '-')}"


RENAMED = {"cut": "exit_layer", "near": "recent_tokens"}  # old name of a field -> its name today


def renamed(word: str) -> str:
    """What to say to a user who wrote the old name of an option, as a flag or as a key; "" if no option had it."""
    name = RENAMED.get(word.lstrip("-").replace("-", "_"))
    if name is None:
        return ""
    today = flag_of(name) if word.startswith("-") else name
    return f"{word} has another name now; write {today}"
