"""What a user asks becomes the options of a job: known names, dependent defaults, and options that apply.

    asked {name: value} ─► settle: defaults of engine, fit and maps ─► JobOptions ─► applying: idle options are refused

The command line, `--config FILE`, a changed run, Olive and Python pass the same two steps.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nbl_export.errors import UsageError
from nbl_export.records.from_json import read_record
from nbl_export.records.goals import GOALS, names_layers
from nbl_export.records.option import Option, options_of
from nbl_export.records.options import JobOptions, usual_tap
from nbl_export.records.proposers import AUTO

__all__ = ["ALWAYS", "RULES", "Case", "applying", "flag_of", "numbers", "over", "read_asked", "refuse_idle", "settle"]

Defaults = Callable[[str, str], Mapping[str, Any]]  # engine, provider -> its precision and decoder source

_COUNTS = ("layers", *GOALS)  # one of them sets how many layers are replaced
_DEFAULT: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(JobOptions)}


@dataclass(frozen=True)
class Case:
    """What decides whether an option applies.

    Attributes:
        compiles: the engine compiles graphs of the static form.
        proposes: the engine verifies proposed tokens.
        is_graph, is_gguf, is_nbl: the model is an ONNX graph, a GGUF file, or an NBL checkpoint.
        sweeps: a sweep was asked for, which ranks all layers.
    """

    options: JobOptions
    compiles: bool = False
    proposes: bool = False
    is_graph: bool = False
    is_gguf: bool = False
    is_nbl: bool = False
    sweeps: bool = False

    @property
    def builds_int4(self) -> bool:
        """Whether the GenAI builder writes int4 matrices."""
        return self.options.precision == "int4" and self.options.decoder_source == "genai"

    @property
    def on_cpu(self) -> bool:
        """Whether the engine is ONNX Runtime on a CPU."""
        return (self.options.engine, self.options.provider) == ("ort", "cpu")


@dataclass(frozen=True)
class Rule:
    """A condition of an option. belongs: ends the sentence "--option is for ..."."""

    belongs: str
    holds: Callable[[Case], bool]


_ORIGINAL = Rule(
    "the original model; this NBL checkpoint no longer contains the removed attention", lambda c: not c.is_nbl
)
_TORCH = Rule("a checkpoint, which torch runs; this model is an ONNX graph", lambda c: not c.is_graph)
_GRAPH_TYPES = Rule(
    "a checkpoint, which torch runs; this model is an ONNX graph, which computes in its own types",
    lambda c: not c.is_graph or c.options.compute_dtype == "float32",
)
_DISTILLED = Rule("--fit distilled", lambda c: c.options.fit == "distilled")
_CLOSED = Rule("maps fitted in closed form (--fit independent)", lambda c: c.options.fit == "independent")
_FITTED = Rule("fitted maps (--fit independent or distilled)", lambda c: c.options.fit != "drop")
_ORDERED = Rule(
    "a number of layers or a goal; --layers names the layers here",
    lambda c: c.sweeps or not names_layers(c.options.layers) or _counts_draft(c.options),
)
_SEEDED = Rule("--fit distilled or --calibration self", lambda c: c.options.fit == "distilled" or c.options.says_itself)
_COMPILED = Rule("engines that compile graphs (trt, trt-rtx)", lambda c: c.compiles)
_UNCOMPILED = Rule("engines that compile nothing (ort, openvino)", lambda c: not c.compiles)
_PROVIDED = Rule("--engine ort", lambda c: c.options.engine == "ort")
_GENAI = Rule("--decoder-source genai", lambda c: c.options.decoder_source == "genai")
# The builder reads these for MatMulNBits alone (onnxruntime_genai 0.18, models/builder.py).
_OF_ROUNDING = ("accuracy_level", "algo_config", "block_size")
_QUANTISED = Rule(
    f"--precision int8, int4 or gguf ({', '.join(_OF_ROUNDING)})",
    lambda c: (
        c.options.precision in ("int8", "int4", "gguf")
        or not any(word.partition("=")[0] in _OF_ROUNDING for word in c.options.builder_option)
    ),
)
_INT4 = Rule("--precision int4 of --decoder-source genai", lambda c: c.builds_int4)
_ROUNDED = Rule(
    "--precision int4 of --decoder-source genai on a CPU, without --quantized-model",
    lambda c: c.builds_int4 and c.options.provider == "cpu" and c.options.quantized_model is None,
)
_CODED = Rule(
    "--precision int8 or int4 of a .gguf file, with --engine ort on a CPU",
    lambda c: (
        c.is_gguf and c.on_cpu and c.options.decoder_source == "genai" and c.options.precision in ("int8", "int4")
    ),
)
_PROPOSED = Rule("engines ort and openvino on a CPU", lambda c: c.proposes)
_NBL_DRAFT = Rule("--draft nbl or auto", lambda c: c.options.draft in ("nbl", AUTO))

# Where an option applies: all of its rules hold.
RULES: dict[str, tuple[Rule, ...]] = {
    "layers": (_ORIGINAL,),
    "max_perplexity_increase": (_ORIGINAL, _TORCH),
    "target_speedup": (_ORIGINAL,),
    "kv_budget": (_ORIGINAL,),
    "select": (_ORIGINAL, _ORDERED),
    "rank": (_ORIGINAL, _CLOSED),
    "maps": (_ORIGINAL, _FITTED),
    "distill_minutes": (_DISTILLED,),
    "distill_steps": (_DISTILLED,),
    "distill_tokens": (_DISTILLED,),
    "lora_rank": (_DISTILLED,),
    "label_weight": (_DISTILLED,),
    "compute_dtype": (_ORIGINAL, _GRAPH_TYPES),
    "seed": (_SEEDED,),
    "shard": (_ORIGINAL,),
    "requantize": (_CODED,),
    "provider": (_PROVIDED,),
    "max_seq_len": (_COMPILED,),
    "max_batch": (_COMPILED,),
    "prefill_chunk": (_COMPILED,),
    "builder_option": (_GENAI, _QUANTISED),
    "quantize": (_ROUNDED,),
    "quantized_model": (_INT4,),
    "draft": (_PROPOSED, _ORIGINAL),
    "draft_layers": (_NBL_DRAFT,),
    "threads": (_UNCOMPILED,),
    "batches": (_UNCOMPILED,),
}
# Options that apply to every job; other checks judge their values.
ALWAYS = (
    "engine", "fit", "tap", "token_table", "calibration", "calibration_tokens", "context", "precision", "logits",
    "decoder_source", "depths", "repetitions", "prompt_tokens", "generate_tokens",
)  # fmt: skip


def _counts_draft(options: JobOptions) -> bool:
    """Whether `--draft-layers` is a number, which takes the first layers of the order."""
    return options.draft_layers is not None and not names_layers(options.draft_layers, "--draft-layers")


def settle(asked: Mapping[str, Any], defaults: Defaults, recorded: JobOptions | None = None) -> JobOptions:
    """The options of a job: what was asked, over recorded options if any, and defaults that depend on the rest.

    The tap of `--fit distilled` and of `--maps linear` is normed unless another is asked for. Precision and decoder
    source are the engine's first unless they are asked for. A recorded value that was a default follows the new ones.

    Args:
        asked: by the names of the options; None asks for nothing.
        recorded: the options of a run. A new count or goal replaces the recorded count or goal.

    Raises:
        UsageError: a name is unknown, or a value is of the wrong kind.
        ValueError: a value is not possible.
    """
    given = {name: value for name, value in read_asked(asked).items() if value is not None}
    values = over({} if recorded is None else _asked_for(recorded, defaults), given)
    try:
        return read_record(JobOptions, {**_dependent(values, defaults), **values})
    except TypeError as error:
        raise UsageError(f"the options cannot be used: {error}") from error


def over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values with the given ones in their place; a given count or goal replaces every other count or goal."""
    if any(name in given for name in _COUNTS):
        values = {name: value for name, value in values.items() if name not in _COUNTS}
    return {**values, **given}


def _dependent(values: Mapping[str, Any], defaults: Defaults) -> dict[str, Any]:
    """Defaults that depend on other options."""
    fit, maps, engine, provider = (str(values.get(n, _DEFAULT[n])) for n in ("fit", "maps", "engine", "provider"))
    return {**defaults(engine, provider), "tap": usual_tap(fit, maps)}


def _asked_for(options: JobOptions, defaults: Defaults) -> dict[str, Any]:
    """The values that are not the defaults of these options."""
    values = {name: getattr(options, name) for name in _DEFAULT}
    usual = {**_DEFAULT, **_dependent(values, defaults)}
    return {name: value for name, value in values.items() if value != usual[name]}


def applying(case: Case, given: Collection[str]) -> JobOptions:
    """The options, with recorded ones that no longer apply at their defaults; unchanged if nothing is asked for.

    Args:
        given: names of the options that were asked for now.

    Raises:
        UsageError: a given option does not apply; the message says what the option belongs to.
    """
    if not given:
        return case.options
    refuse_idle(case, given)
    recorded = {name: _DEFAULT[name] for name in RULES if _broken(case, name) is not None}
    return dataclasses.replace(case.options, **recorded)


def refuse_idle(case: Case, given: Collection[str] | None = None) -> None:
    """Refuse an option that has no effect.

    Args:
        given: names of options; None means every option that is not at its default.

    Raises:
        UsageError: the message says what the option belongs to.
    """
    if given is None:
        given = [name for name in RULES if getattr(case.options, name) != _DEFAULT[name]]
    for name in RULES:
        broken = _broken(case, name) if name in given else None
        if broken is not None:
            raise UsageError(f"{flag_of(name)} is for {broken.belongs}; leave {flag_of(name)} out")


def _broken(case: Case, name: str) -> Rule | None:
    return next((rule for rule in RULES[name] if not rule.holds(case)), None)


def flag_of(name: str) -> str:
    """The option as the command line has it."""
    said = options_of(JobOptions).get(name)
    return f"--{((said.flag if said else '') or name).replace('_', '-')}"


# -- values -----------------------------------------------------------------------------------------------------


def read_asked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the field names of JobOptions, in its types. A name may be that of the field or of the flag.

    Numbers are accepted for texts of numbers (layers = 8), and one text for a list of texts.

    Raises:
        UsageError: a name is no option, or a text holds no numbers.
    """
    said = options_of(JobOptions)
    names = {"model": "model", **{name: name for name in said}, **{s.flag or name: name for name, s in said.items()}}
    found: dict[str, Any] = {}
    for key, value in values.items():
        flag = key.replace("-", "_")
        if flag not in names:
            near = difflib.get_close_matches(flag, names, 1)
            raise UsageError(f"{key} is no option" + (f"; did you mean {near[0]}?" if near else ""))
        found[names[flag]] = _value(names[flag], value, said.get(names[flag]))
    return found


def _value(name: str, value: Any, said: Option | None) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if said is not None and said.numbers and isinstance(value, (str, int)) and not isinstance(value, bool):
        return numbers(str(value), said, name)
    if name in ("calibration", "builder_option") and isinstance(value, str):
        return (value,)
    if name in (*_COUNTS, "rank", "draft_layers") and is_number:
        return str(value)
    if name == "precision" and isinstance(value, str):
        return value.lower()
    return tuple(value) if isinstance(value, list) else value


def numbers(text: str, said: Option, name: str) -> tuple[int, ...]:
    """The distinct numbers of a comma-separated text, in their order.

    Raises:
        UsageError: a part is not a number, or a number is too small.
    """
    parts, least = [part.strip() for part in text.split(",")], int(said.least or 0)
    if not all(part.isascii() and part.isdigit() and int(part) >= least for part in parts):
        flag = f"--{(said.flag or name).replace('_', '-')}"
        raise UsageError(f"{flag} {text!r}: write numbers of at least {least}, comma separated ({said.numbers})")
    return tuple(dict.fromkeys(int(part) for part in parts))
