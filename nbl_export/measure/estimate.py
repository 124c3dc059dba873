"""What a job will take: seconds, memory and disk of each stage, from the sizes of the model and two rates.

    product   additions and multiplications a second of a float32 matrix product
    copy      bytes a second that one thread copies in memory

Seconds are work over a rate. One forward pass over a token costs 2 x elements of all matrices, and attention. It runs
at the rate of the product: 188 and 215 billion operations a second in stages-*.json of bench/results, and the product
198 billion on the same kind of machine. Stages are counted in such passes:

    calibrate   a pass without the head over the text, and three products of rows for the moments
    plan        each layer replaced alone: half a pass on average; then sets of layers, and tests of a limit on quality
    distill     a step of 1,024 tokens: `_STEP` passes; the tests at the end as in the plan
    verify      both graphs on the final text, and `_PROBED` tokens of probes
    bench       loads of both graphs, each with prefill and decode at every depth

Each coefficient below has its source. `tests/measure/test_estimate.py` compares the result with the measured jobs of
bench/results: stages-smollm2.json and stages-qwen.json in float32, shapes-3b.json and shapes-8b.json in int4. All of
them ran on ONNX Runtime's CPU provider. So OpenVINO and other precisions are less certain.

Memory is the peak of the process. It includes mapped files, whose pages the kernel can drop. `needed` is without these
and without Python and its libraries, in the form in which a stage runs if memory is short.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from nbl_export.measure.cost import CostModel, LayerSizes, weight_bytes
from nbl_export.measure.machine_speed import Speed
from nbl_export.measure.rounds import LOOKS, Rule
from nbl_export.mixers.base import TokenWork
from nbl_export.mixers.rows import Read
from nbl_export.model.checkpoint.shape import Shape
from nbl_export.model.memory import STATES_SHARE, WEIGHTS_SHARE
from nbl_export.options.goals import (
    DEFAULT_STEPS,
    CacheBudget,
    asked_layers,
    default_minutes,
    goal_of,
    layers_for_budget,
    names_layers,
)
from nbl_export.options.options import AUTO_WINDOWS, CHECKPOINT_FIT, WIDTHS, JobOptions
from nbl_export.records.capabilities import Capabilities
from nbl_export.text.windows import deciding_tokens, final_tokens, judging_tokens

__all__ = ["STAGES", "Gain", "Job", "Needs"]

STAGES = ("calibrate", "plan", "distill", "decoder", "rewrite", "verify", "bench")  # that are estimated, in order

# -- time. "smollm2" and "qwen" are stages-*.json, the 3B and 8B shapes are shapes-*.json in bench/results.
_NARROW = 2.0  # products in bfloat16 over float32: AVX512_BF16 has twice the products a cycle
_START_SECONDS = 5.0  # a process loads torch, tokenizer and text before its first pass
_SUMS = 14 / 3  # x D^2 additions and multiplications of a token's moments: Y'X, and 2/3 of X'X and Y'Y (`sums._gram`)
_FIT = 28.0  # x D^3 of float32 work to score or fit one map, in float64: plan of the 8B shape
_TRIED = 1.5  # passes of each step of an order: at most 3 layers are tried
_JUDGED = 4  # every fourth position of the choosing text is judged
_HEADS = 2  # products with the head at a judged position: change of the logits, and its pull
_CURVE = 3  # sets beyond the order, for the curve
_LONG_KINDS, _TOP_PARTS = 2048, 3  # tokens of a row that kinds are chosen by; eighths of the layers that are tried
_TESTS = 3  # tests of a limit on quality: smollm2 took 3, qwen 2
_STEP, _STEP_TOKENS = 3.5, 1024  # passes of a training step: distill-qwen.json, 8.2 s a step
_PROBED = 36_000  # tokens of all probes of verification: smollm2 and qwen, without the final text
_CODED = 2.0  # products of rounded matrices and 8-bit activations over float32: the 3B shape
_WRITTEN = 4e8  # bytes a second that an export reads, or writes and hashes: smollm2 and qwen
_ROUNDED_WEIGHTS = 7e7  # a second that an export rounds: the 3B and 8B shapes
_REWRITTEN = 1.2e9  # bytes a second of a rewritten graph: smollm2 and qwen
_LOADED = 7e8  # bytes a second of a graph that is opened: demo-smollm2-fp32.json
_DECODED = 2.0  # bytes that decode reads while one thread copies one: all threads read

# -- memory
_PROCESS = 5e8  # bytes of Python, torch and transformers: the first stage of qwen and smollm2
_BATCH = 4096  # tokens that run at once
_LOGIT_ROWS = 4500  # float32 logits beside the model while layers are chosen: smollm2 and qwen
_LONG_ROW = 2056  # positions of the longest probe
_FIT_MATRICES = 10  # D x D of float64 while a map is fitted: plan of the 8B shape
_FLOATS = 3  # matrices in float32 while the export rounds one: the head of the 3B shape
_REFERENCE_ROWS = 450  # float32 logits that references.safetensors keeps

_DECODE_BYTES = 80 << 30  # as `benchmark.decode_tokens`
_SECTIONS = 8  # the table of gains has a row for each eighth of the layers, up to half of them


@dataclass(frozen=True)
class Needs:
    """What a stage takes.

    Attributes:
        peak_bytes: of memory, mapped files included. needed_bytes: that the stage must get beside its libraries.
        disk_bytes: that the stage leaves in the run directory.
    """

    stage: str
    seconds: float
    peak_bytes: float
    needed_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Gain:
    """Modelled gain of a number of replaced layers. last: if these are the last layers."""

    layers: int
    prefill: float
    prefill_last: float
    decode: float
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Job:
    """A job that is estimated.

    Attributes:
        options: settled.
        narrow: products in bfloat16 while calibrating and choosing layers.
        available_bytes: memory.
        runs_here: the engine runs on this machine's processor, so that bench runs.
    """

    shape: Shape
    options: JobOptions
    engine: Capabilities
    speed: Speed
    narrow: bool
    available_bytes: int
    runs_here: bool = True

    # -- sizes ---------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> float:
        """Bytes of the model in float32."""
        return 4.0 * self.shape.parameters

    @property
    def fits(self) -> bool:
        """Whether the whole model fits into memory; else one layer at a time is in memory."""
        return self.weights <= WEIGHTS_SHARE * self.available_bytes

    @property
    def graph(self) -> float:
        """Bytes of a graph. Its embedding stays in float32, or float16, unless it is the head."""
        s, size = self.shape, weight_bytes(self.options.precision)
        table = 0 if s.tied else s.head_parameters * (2 if self.options.precision in ("fp16", "bf16") else 4)
        return (s.parameters_of_layers + s.head_parameters) * size + table

    @property
    def taps(self) -> int:
        """Taps whose moments are collected."""
        return len({"residual", self.options.tap})

    @property
    def sums(self) -> float:
        """Bytes of the sums in memory: three matrices of float64 for each layer and tap."""
        return 24.0 * self.shape.decoder.hidden_size**2 * self.shape.decoder.num_layers * self.taps

    @property
    def moments(self) -> float:
        """Bytes of moments.safetensors, which has half of the two symmetric matrices."""
        return self.sums * 2 / 3

    @property
    def given(self) -> bool:
        """Whether the model has maps already."""
        return self.options.fit == CHECKPOINT_FIT

    @functools.cached_property
    def count(self) -> int:
        """Layers that are replaced: as asked, or a quarter of them if a goal decides."""
        decoder, goal = self.shape.decoder, goal_of(self.options)
        if self.options.layers is not None:
            asked = asked_layers(self.options, decoder)
            return asked if isinstance(asked, int) else len(asked)
        if isinstance(goal, CacheBudget):
            return layers_for_budget(self.options, goal, decoder, self._cache_item)[0]
        return max(1, round(self.shape.decoder.num_layers / 4))

    @property
    def _cache_item(self) -> int:
        return self.engine.cache_itemsize(self.options.precision)

    @property
    def costs(self) -> CostModel:
        """The cost model of the graphs."""
        size = weight_bytes(self.options.precision)
        pruned = self.options.kept_logits == "last"
        return CostModel(
            self.shape.decoder, self.shape.mlp, size, size, self._cache_item, self.options.prompt_length,
            all_logits=not pruned, tail_pruned=pruned,
            every_expert=self.options.decoder_source in self.engine.every_expert,
        )  # fmt: skip

    # -- time ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _pass(self) -> float:
        """Work of one token through all layers, in windows of the context."""
        return self._prefill(self.options.context) / self.options.context

    @property
    def _head(self) -> float:
        return 2.0 * self.shape.head_parameters

    def _prefill(self, tokens: int, depth: int = 0) -> float:
        plain = CostModel(self.shape.decoder, self.shape.mlp, 4, 4, 4, tail_pruned=False)
        return plain.prefill({}, tokens, depth).flops - self._head

    @property
    def _torch_rate(self) -> float:
        return self.speed.product_flops_per_second * (_NARROW if self.narrow else 1)

    def _calibrate_seconds(self) -> float:
        tokens, d = self.options.calibration_tokens, self.shape.decoder
        sums = self.taps * _SUMS * d.hidden_size**2 * self.shape.decoder.num_layers * tokens
        read = self.weights * (2 if self.shape.is_gguf else 1) / _WRITTEN / 4
        return (
            _START_SECONDS + read + tokens * self._pass / self._torch_rate + sums / self.speed.product_flops_per_second
        )

    @property
    def judges(self) -> bool:
        """Whether the model's output orders the layers."""
        options = self.options
        return options.select not in ("cca", "error") and not names_layers(options.layers)

    @property
    def tests(self) -> bool:
        """Whether a limit on quality decides the number of layers."""
        options = self.options
        return (options.layers, options.target_speedup, options.kv_budget) == (None, None, None)

    def _test_work(self) -> float:
        """Work of one test of a limit: the original, and half of a pass of the replaced set, with both heads."""
        return deciding_tokens(self.options.context) * (1.5 * self._pass + 2 * self._head)

    def _plan_seconds(self) -> float:
        d, tokens = self.shape.decoder, judging_tokens(self.options.context)
        fits = self.taps * _FIT * d.hidden_size**3 * self.shape.decoder.num_layers
        work, judged = 0.0, tokens / _JUDGED * self._head
        if self.judges:
            work += self.shape.decoder.num_layers * (tokens * self._pass / 2 + _HEADS * judged)
            steps = (
                self.shape.decoder.num_layers / 2 if self._trains and self.tests else self.count
            )  # a training begins with more layers
            work += (steps + _CURVE) * _TRIED * (tokens * self._pass / 2 + judged)
        if self.options.window_layers == AUTO_WINDOWS:
            work += self._top_work()
        if self.tests and not self._trains:
            work += _TESTS * self._test_work()
        return _START_SECONDS + fits / self.speed.product_flops_per_second + work / self._torch_rate

    def _top_work(self) -> float:
        """Work of `plan.kinds`: the original, and each layer of some eighths with each kind."""
        tokens = 3 * min(_LONG_KINDS, self.shape.decoder.max_positions)  # a row of each text, and of repeated passages
        kinds = 1 + (1 if self.options.window else len(WIDTHS))
        part = self.shape.decoder.num_layers / 8
        passes = 1 + kinds * sum(part * (place + 0.5) / 8 for place in range(_TOP_PARTS))
        heads = kinds * _TOP_PARTS * (1 + part) / 8  # every eighth position is judged
        return tokens * (passes * self._pass + heads * self._head)

    @property
    def _trains(self) -> bool:
        return self.options.fit == "distilled" and self.fits

    def _distill_seconds(self) -> float:
        options = self.options
        minutes, steps = options.distill_minutes, options.distill_steps
        if minutes is None and steps is None and self.tests:
            minutes = default_minutes(self.shape.parameters)
        step = _STEP * _STEP_TOKENS * (self._pass + self._head) / self._torch_rate
        trained = min(60 * (minutes or math.inf), step * (steps or (math.inf if minutes else DEFAULT_STEPS)))
        return trained + (_TESTS * self._test_work() / self._torch_rate if self.tests else 0)

    @property
    def _is_quantised(self) -> bool:
        return self.options.precision not in ("fp32", "fp16", "bf16")

    def _verify_seconds(self) -> float:
        probed, final = _PROBED, 2 * final_tokens(self.options.context)
        if self._is_quantised:
            final = round(final / _CODED)
            probed *= 2 if self.fits else 1  # a float32 twin is written and opened; else a twin keeps its codes
        return _START_SECONDS + (final + probed) * (self._pass + self._head) / self.speed.product_flops_per_second

    def _bench_seconds(self) -> float:
        options = self.options
        usual = next((n for n in (128, 64, 32) if n * self.graph <= _DECODE_BYTES), 16)
        decoded = options.generate_tokens or usual
        work = steps = 0.0
        for depth in options.depths:
            work += self._prefill(depth) + 2 * sum(self._prefill(n, depth) for n in options.prompt_tokens)
            steps += decoded + 2
        read = steps * self.graph / (_DECODED * self.speed.copied_bytes_per_second)
        load = self.graph / _LOADED + work / self.speed.product_flops_per_second + read
        return 2 * load * self._rounds(2 * load)

    def _rounds(self, seconds: float) -> int:
        """Loads of each graph: as many as the time of `rounds.Rule` allows, since an interval is seldom narrow."""
        if self.options.repetitions:
            return self.options.repetitions
        return max([LOOKS[0], *(n for n in LOOKS if n * seconds <= Rule().seconds)])

    # -- memory: peak, and what is needed ------------------------------------------------------------------------

    @property
    def _activations(self) -> float:
        return 12.0 * _BATCH * self.shape.mlp.active

    @property
    def _narrow_copies(self) -> float:
        return 2.0 * self.shape.parameters_of_layers if self.narrow else 0.0

    def _calibrate_memory(self) -> tuple[float, float]:
        s = self.shape
        layer = 4.0 * (s.layer_parameters + s.head_parameters) + (2.0 * s.layer_parameters if self.narrow else 0)
        one = _PROCESS + layer + 3 * self.sums / self.shape.decoder.num_layers + self._activations
        whole = _PROCESS + self.weights + self._narrow_copies + self.sums + self._activations
        return (whole if self.fits else one), min(whole, one)

    def _plan_memory(self) -> tuple[float, float]:
        s = self.shape
        work = 8.0 * _FIT_MATRICES * s.decoder.hidden_size**2
        if not (self.judges or self.tests):
            return _PROCESS + work, _PROCESS + work  # the moments of a layer at a time
        model = self.weights + self._narrow_copies
        if not self.fits:  # a layer or the head, and hidden states (`model.streamed`)
            model = 4.0 * (s.layer_parameters + s.head_parameters) + STATES_SHARE * self.available_bytes
        logits = 4.0 * _LOGIT_ROWS * s.decoder.vocab_size
        return _PROCESS + model + self.moments + logits + self._activations, _PROCESS + work

    def _distill_memory(self) -> tuple[float, float]:
        model = _PROCESS + 1.5 * self.weights + 8.0 * _STEP_TOKENS * self.shape.decoder.vocab_size * 4
        return model, _PROCESS + self.weights

    def _export_seconds(self) -> float:
        rounded = self.shape.parameters if self.options.precision in self.engine.rounded else 0
        return (self.weights + self.graph) / _WRITTEN + rounded / _ROUNDED_WEIGHTS

    def _export_memory(self) -> tuple[float, float]:
        """An export that rounds a matrix at a time maps the checkpoint; its pages leave when memory is short."""
        held, precision = _PROCESS + self.graph, self.options.precision
        if precision not in self.engine.mapped.get(self.options.decoder_source, ()):
            return held + 2 * self.weights, held + self.weights
        if precision not in self.engine.rounded:
            return held + 2 * self.weights, held
        held += _FLOATS * 4.0 * self.shape.head_parameters
        return min(held + self.weights / 2, max(held, self.available_bytes)), held

    def _verify_memory(self) -> tuple[float, float]:
        """Torch, and both graphs: each in its mapped file and as the kernels pack it; quantised: a float32 twin too.

        If memory is short, a layer or the head takes the place of the model, and a twin keeps its codes.
        """
        s, graph = self.shape, self.graph
        logits = 4.0 * _LONG_ROW * s.decoder.vocab_size
        layer = 4.0 * (s.layer_parameters + s.head_parameters)
        model, twin = (self.weights, 2 * self.weights) if self.fits else (layer, 2 * graph)
        packed = graph if self._is_quantised else 0
        peak = _PROCESS + model + (twin if self._is_quantised else 0) + 4 * graph + logits
        return peak, _PROCESS + min(self.weights, max(layer, packed))

    # -- the whole -----------------------------------------------------------------------------------------------

    def needs(self) -> tuple[Needs, ...]:
        """Each stage that the job runs, in order."""
        graph, maps = self.graph, 4.0 * self.count * self.shape.decoder.hidden_size**2
        converted = self.weights if self.shape.is_gguf or self.shape.maps_tap else 0.0
        kept = converted if self.given else 0.0
        references = 4.0 * _REFERENCE_ROWS * self.shape.decoder.vocab_size
        start = maps if self._trains else 0.0
        made: dict[str, Callable[[], tuple[float, tuple[float, float], float]]] = {
            "calibrate": lambda: (self._calibrate_seconds(), self._calibrate_memory(), self.moments + converted),
            "plan": lambda: (self._plan_seconds(), self._plan_memory(), maps),
            "distill": lambda: (self._distill_seconds(), self._distill_memory(), start),
            "decoder": lambda: (self._export_seconds(), self._export_memory(), graph + kept),
            "rewrite": lambda: (graph / _REWRITTEN, (_PROCESS + graph, _PROCESS), graph),
            "verify": lambda: (self._verify_seconds(), self._verify_memory(), references),
            "bench": lambda: (self._bench_seconds(), (_PROCESS + 4 * graph, _PROCESS + graph), 0.0),
        }
        left_out = {"calibrate", "plan"} if self.given else set()
        left_out |= set() if self._trains else {"distill"}
        left_out |= set() if self.runs_here else {"bench"}
        found = []
        for stage in (name for name in STAGES if name not in left_out):
            seconds, (peak, needed), disk = made[stage]()
            found.append(Needs(stage, seconds, peak, min(peak, needed) - _PROCESS, disk))
        return tuple(found)

    def gains(self) -> tuple[Gain, ...]:
        """The modelled gain of an eighth, a quarter, ... of the layers, and of the number that is asked for."""
        layers = self.shape.decoder.num_layers
        counts = {round(k * layers / _SECTIONS) for k in range(1, _SECTIONS // 2 + 1)}
        counts |= {self.count} if self.options.layers or self.options.kv_budget else set()
        return tuple(self._gain(n) for n in sorted(counts - {0}))

    def _gain(self, count: int) -> Gain:
        decoder, costs = self.shape.decoder, self.costs
        layers, first = range(decoder.num_layers), (decoder.num_layers - count) // 2
        middle, last = layers[first : first + count], layers[-count:]  # the middle is neither pruned nor looked up
        speeds = [costs.speedup_of_sizes(dict.fromkeys(chosen, self._map)) for chosen in (middle, last)]
        cache = decoder.cache_bytes_per_token(self.shape.decoder.num_layers - count, self._cache_item)
        return Gain(count, speeds[0].prefill, speeds[1].prefill, speeds[0].decode, cache)

    @property
    def _map(self) -> LayerSizes:
        elements = 0 if self.options.fit == "drop" else self.shape.decoder.hidden_size**2
        return LayerSizes((Read(),), (TokenWork(elements, elements),))
