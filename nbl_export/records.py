"""The nouns that pass between stages: frozen, without I/O, contradictions refused on construction.

Dimension legend (also used in names elsewhere): B batch, T tokens, D hidden size, N rows (tokens) of a
calibration batch, V vocabulary, H query heads, Hkv key/value heads.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.typed_json import read_record

__all__ = [
    "FITS",
    "METHODS",
    "SELECTS",
    "TAPS",
    "AffineMap",
    "DecoderSpec",
    "GraphContract",
    "JobOptions",
    "LayerScore",
    "PassReport",
    "Plan",
    "RungResult",
    "Scenario",
    "TensorInfo",
    "Timing",
    "layers_below",
    "spoken_layers",
]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DecoderSpec:
    """The numbers of a decoder that the rest of the tool needs, in one vocabulary for all architectures.

    sliding_window: of the layers that have one; full_layers: those that see everything all the same.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_layers", tuple(self.full_layers))  # JSON has no tuples
        _require(self.num_layers >= 1, "a decoder has at least one layer")
        sizes = (self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.vocab_size)
        _require(min(*sizes, self.max_positions) >= 1, "the sizes of a decoder are at least 1")
        _require(self.num_heads % self.num_kv_heads == 0, "query heads are a multiple of key/value heads")

    def window_of(self, layer: int) -> int | None:
        """Tokens that a layer sees, itself included; None for all."""
        return None if layer in self.full_layers else self.sliding_window

    def cache_bytes_per_token(self, kept_layers: int, itemsize: int) -> int:
        """Key and value bytes that one token of one sequence adds: kept layers x 2 x Hkv x head x itemsize."""
        return kept_layers * 2 * self.num_kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class LayerScore:
    """How well one affine map can stand in for a layer's attention (method: Erdogan et al. 2025).

    bound: sum_i (1 - rho_i^2) over the canonical correlations of input and residual output (CCA); smaller is better. A
    bound on the NMSE of that output which is loose (up to the hidden size; 11 to 99 for SmolLM2, where no NMSE is above
    1): it ranks layers.
    nmse: exact calibration error of the attention output, tr(Cyy - W Cxy) / tr(Cyy).
    relative_error: the same error relative to the residual output, tr(Cyy - W Cxy) / tr(C++).
    """

    layer: int
    bound: float
    nmse: float
    relative_error: float


@dataclass(frozen=True)
class AffineMap:
    """attention(norm(x)) ~ t W' + b for rows t of the tap (see `TAPS`); weight [D, D] and bias [D], float32.

    A map of rank k < D / 2 also has the factors of its weight, up [D, k] and down [k, D], W = up down: two thin
    products are then cheaper than one square one, and are what a graph gets.
    """

    weight: np.ndarray
    bias: np.ndarray
    up: np.ndarray | None = None
    down: np.ndarray | None = None

    def __post_init__(self) -> None:
        _require(self.weight.ndim == 2 and self.bias.ndim == 1, "weight is a matrix, bias a vector")
        _require(self.weight.shape[0] == self.bias.shape[0], "weight and bias disagree on the output size")
        _require((self.up is None) == (self.down is None), "a map has both factors or none")
        if self.up is not None and self.down is not None:
            same = (
                self.up.shape[1] == self.down.shape[0] and (self.up.shape[0], self.down.shape[1]) == self.weight.shape
            )
            _require(same, "the factors are not of this weight")

    @classmethod
    def factored(cls, up: np.ndarray, down: np.ndarray, bias: np.ndarray) -> AffineMap:
        """The map whose weight is up down."""
        return cls(up @ down, bias, up, down)

    @property
    def matrices(self) -> dict[str, np.ndarray]:
        """What is stored and multiplied with, in order, by name: the weight, or down and then up."""
        if self.up is None or self.down is None:
            return {"weight": self.weight}
        return {"down": self.down, "up": self.up}


def spoken_layers(layers: Sequence[int]) -> str:
    """Sorted layers as the command line takes them: 0, 7, 24-29."""
    starts = [i for i in layers if i - 1 not in layers]
    ends = [i for i in layers if i + 1 not in layers]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def layers_below(replaced: Collection[int]) -> range:
    """Replaced layers below the first kept one."""
    return range(next(i for i in range(len(replaced) + 1) if i not in replaced))


# What a map is applied to: the residual stream before the layer's norm (the paper's reference code), or the
# layer's normed input (what engines that know linear-replaced attention expect; well conditioned).
TAPS = ("residual", "normed")
# What distillation multiplies in; auto: bf16 where it is native.
DTYPES = ("auto", "fp32", "bf16")
# How a plan's maps come about: each layer by itself in closed form, trained together from there, with the checkpoint.
FITS = ("independent", "distilled", "given")
# How layers are ranked: smallest CCA bound, smallest relative error, or what the model's output loses (`greedy`).
SELECTS = ("cca", "error", "greedy", "efficient")
# What stands in for attention: the fitted map, nothing, or attention that sees only its own token (`methods`).
METHODS = ("nbl", "drop", "wo-wv")


@dataclass(frozen=True)
class Plan:
    """Which layers lose their attention. The empty plan is legal and means the original model."""

    num_layers: int
    replaced: tuple[int, ...]
    tap: str = "residual"
    select: str = "cca"
    scores: tuple[LayerScore, ...] = ()

    def __post_init__(self) -> None:
        _require(self.replaced == tuple(sorted(set(self.replaced))), "replaced layers are sorted and distinct")
        _require(all(0 <= i < self.num_layers for i in self.replaced), "a replaced layer does not exist")
        _require(len(self.replaced) < self.num_layers, "at least one attention layer stays")
        _require(self.tap in TAPS, f"unknown tap {self.tap!r}; taps are {', '.join(TAPS)}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Layers that keep attention and cache, ascending."""
        gone = set(self.replaced)
        return tuple(i for i in range(self.num_layers) if i not in gone)


@dataclass(frozen=True)
class TensorInfo:
    """Name, element type (ONNX spelling, lower case) and dimensions (int, or the name of a symbol)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphContract:
    """What a decoder graph takes and gives, and which layers keep a cache."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    cache_layers: tuple[int, ...]

    @property
    def logits(self) -> str:
        """ "last" where logits are [B, 1, V], those of each row's last token; "all" where they are [B, T, V]."""
        shape = next((o.shape for o in self.outputs if o.name == "logits"), ())
        return "last" if len(shape) == 3 and shape[1] == 1 else "all"

    def cache_bytes_per_token(self, head_dim: int) -> int:
        """Cache bytes that one token of one sequence takes, from the cache inputs.

        head_dim fills the last dimension where the exporter names it instead of stating it (the GenAI
        builder does); a stated one that disagrees is an error.
        """
        total = 0
        for info in self.inputs:
            if not info.name.startswith("past_key_values."):
                continue
            heads, stated = info.shape[1], info.shape[3]
            _require(isinstance(heads, int), f"{info.name} has no fixed number of heads")
            _require(not isinstance(stated, int) or stated == head_dim, f"{info.name} has head size {stated}")
            total += int(heads) * head_dim * ITEMSIZE[info.dtype]
        return total


ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class PassReport:
    """What one graph pass did. `modified` is true exactly when something changed."""

    name: str
    modified: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RungResult:
    """One rung of the verification ladder: the figure seen and the tolerance it is held against.

    value None means not finite; tolerance None means reported and not gated.
    """

    rung: str
    subject: str
    metric: str
    value: float | None
    tolerance: float | None
    passed: bool
    detail: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            _require(not self.passed, "a figure that is not finite does not pass")
            object.__setattr__(self, "value", None)  # JSON has no NaN


@dataclass(frozen=True)
class Scenario:
    """One benchmark row in llama-bench's terms: pp<T> is prefill of T tokens, tg<T> decode of T tokens.

    batch: sequences that run side by side, each with these tokens at this depth. threads: None is the engine's choice.
    """

    kind: str
    tokens: int
    depth: int
    batch: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        _require(self.kind in ("pp", "tg"), f"unknown test kind {self.kind!r}")
        _require(self.tokens >= 1 and self.depth >= 0, "tokens are positive, depth is not negative")
        _require(self.batch >= 1 and (self.threads or 1) >= 1, "there is at least one sequence and one thread")

    @property
    def test(self) -> str:
        return f"{self.kind}{self.tokens}"


@dataclass(frozen=True)
class Timing:
    """All repetitions of one scenario on one variant, in nanoseconds, in the order they ran.

    loads: which load of the decoders each ran on; those of one load are not independent of each other.
    first_token_ns: of a prefill, what picking the first token took after it. token_ns: of a decode, each of its steps.
    energy_uj: microjoules of each repetition, where the machine tells.
    """

    scenario: Scenario
    variant: str
    samples_ns: tuple[int, ...]
    loads: tuple[int, ...] = ()
    first_token_ns: tuple[int, ...] = ()
    token_ns: tuple[tuple[int, ...], ...] = ()
    energy_uj: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """Of all sequences of the batch together."""
        return tuple(self.scenario.batch * self.scenario.tokens * 1e9 / ns for ns in self.samples_ns)

    @property
    def ttft_ns(self) -> float | None:
        """Time to first token: median of prefill and the pick of the token that follows it."""
        sums = [prefill + pick for prefill, pick in zip(self.samples_ns, self.first_token_ns, strict=False)]
        return statistics.median(sums) if sums else None

    @property
    def tpot_ns(self) -> dict[str, float] | None:
        """Time per output token: percentiles of the steps of all repetitions, linear between two of them."""
        steps = [ns for run in self.token_ns for ns in run]
        if not steps:
            return None
        return {
            f"p{q}": float(value) for q, value in zip((50, 95, 99), np.percentile(steps, (50, 95, 99)), strict=True)
        }

    @property
    def joules_per_token(self) -> float | None:
        """Median of the repetitions."""
        tokens = self.scenario.batch * self.scenario.tokens
        return statistics.median(self.energy_uj) / tokens / 1e6 if self.energy_uj else None

    @property
    def median(self) -> float:
        return statistics.median(self.tokens_per_second)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.tokens_per_second)

    @property
    def stdev(self) -> float:
        return statistics.stdev(self.tokens_per_second) if len(self.samples_ns) > 1 else 0.0


@dataclass(frozen=True)
class JobOptions:
    """Everything a user can ask of the main job, resolved. Recorded in nbl.json and read back on resume.

    token_table: replaced layers at the bottom of the stack become a table of tokens, where the engine's graphs can.
    builder_option: KEY=VALUE for the GenAI builder. quantized_model: whose codes int4 graphs are made of, see
    `quantized`; None lets the builder quantise. map_bits: of the maps in an int8 or int4 graph, 32 for float32;
    None takes those of the other matrices.
    max_seq_len, max_batch and prefill_chunk are for engines that compile; None takes `job`'s defaults.
    logits: "last" (None) or "all", see `kept_logits`.
    select: None is "efficient", and "cca" where the torch model does not fit into memory.
    data_free: calibrate on what the model itself says (with `seed`), on no text.
    layer_wise: calibrate one decoder layer at a time, whatever the memory.
    calibration: texts, see `mixture`; none of them is the default text.
    shard: "i/n", of a calibration that is to be merged.
    distill_tokens: of the text to distil on, from its beginning; what follows calibration is passed once.
    depths, prompt_tokens, threads, batches: each is a list that bench sweeps; None is the engine's number of threads.
    distill_*, lora_rank and label_weight are for the fit "distilled", see `distill.DistillSettings`; without steps or
    minutes it takes `distill.DEFAULT_STEPS`.
    """

    model: str
    engine: str = "ort"
    layers: str | None = None
    max_perplexity_increase: str | None = None
    target_speedup: str | None = None
    kv_budget: str | None = None
    select: str | None = None
    method: str = "nbl"
    rank: str | None = None
    tap: str = "residual"
    fit: str = "independent"
    distill_steps: int | None = None
    distill_minutes: float | None = None
    distill_tokens: int = 262_144
    distill_dtype: str = "auto"
    lora_rank: int = 16
    label_weight: float = 0.1
    precision: str = "fp32"
    decoder_source: str = "genai"
    provider: str = "cpu"
    builder_option: tuple[str, ...] = ()
    quantized_model: str | None = None
    map_bits: int | None = None
    token_table: bool = True
    max_seq_len: int | None = None
    max_batch: int | None = None
    prefill_chunk: int | None = None
    logits: str | None = None
    calibration: tuple[str, ...] = ()
    calibration_tokens: int = 65_536
    context: int = 512
    data_free: bool = False
    shard: str | None = None
    layer_wise: bool = False
    seed: int = 0
    depths: tuple[int, ...] = (0, 2048)
    repetitions: int | None = None
    prompt_tokens: tuple[int, ...] = (512,)
    generate_tokens: int = 128
    threads: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        for name in ("calibration_tokens", "distill_tokens", "context", "generate_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("prompt_tokens", "batches", "threads"):
            values = getattr(self, name)
            _require(values is None or (values and min(values) >= 1), f"{name} must be at least 1")
        _require(self.repetitions is None or self.repetitions >= 1, "repetitions must be at least 1")
        _require(all(d >= 0 for d in self.depths), "depths are not negative")
        for name in ("max_seq_len", "max_batch", "prefill_chunk"):
            _require((getattr(self, name) or 1) >= 1, f"{name} must be at least 1")
        _require(self.tap in TAPS, f"--tap is {' or '.join(TAPS)}, not {self.tap!r}")
        _require(self.select in (None, *SELECTS), f"--select is {', '.join(SELECTS)}, not {self.select!r}")
        _require(self.method in METHODS, f"--method is {', '.join(METHODS)}, not {self.method!r}")
        _require(self.fit in FITS, f"--fit is {' or '.join(FITS)}, not {self.fit!r}")
        _require(not (self.data_free and self.calibration), "--data-free reads no text; leave --calibration out")
        _require(not (self.data_free and self.layer_wise), "--data-free needs the whole model, --layer-wise has none")
        _require((self.distill_steps or 1) >= 1, "distillation takes at least one step")
        _require((self.distill_minutes or 1) > 0, "--distill-minutes is more than 0")
        _require(self.distill_dtype in DTYPES, f"--distill-dtype is {', '.join(DTYPES)}, not {self.distill_dtype!r}")
        _require(self.lora_rank >= 0, "--lora-rank is not negative")
        _require(0 <= self.label_weight <= 1, f"--label-weight is from 0 to 1, not {self.label_weight}")
        _require(self.map_bits in (None, 4, 8, 32), f"--map-bits is 4, 8 or 32 (float32), not {self.map_bits}")
        _require(self.logits in (None, "last", "all"), f"logits are of the last token or all, not {self.logits!r}")

    @property
    def kept_logits(self) -> str:
        """Positions whose logits the graphs give: "last" valid of each row (what generation reads), or "all"."""
        return self.logits or "last"

    @property
    def prompt_length(self) -> int:
        """Tokens of the prefill that costs are modelled for: the first of those measured."""
        return self.prompt_tokens[0]

    @property
    def first_threads(self) -> int | None:
        """Threads of what is not a measurement; None is the engine's choice."""
        return self.threads[0] if self.threads else None

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobOptions:
        known = {f.name for f in dataclasses.fields(cls)}
        lists = {k: [values[k]] for k in ("prompt_tokens", "threads") if isinstance(values.get(k), int)}
        values = {**values, **lists}  # as they were when each was one number
        if not isinstance(values.get("calibration"), (list, tuple)):  # as it was when there could be only one
            values = {**values, "calibration": [values["calibration"]] if values.get("calibration") else []}
        return read_record(cls, {k: v for k, v in values.items() if k in known})

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
