"""What a job will take: seconds, memory and disk of each stage, from the sizes of the model and one rate.

    seconds   counted work of the stage, over the additions and multiplications a second of a float32 product
    memory    the least that the stage can run with, beside Python and its libraries; a job is refused by this
    disk      what the stage leaves in the run directory

    stage       counted work
    calibrate   one pass of the calibration text, and the products of the sums
    plan        passes of the texts that choose and decide, and of the short contexts of their long-range tokens
    distill     three passes of each step: the teacher, the student and its gradients
    verify      passes of both graphs and of the short contexts, over the test text
    bench       prompts and decoded tokens of both graphs

Sizes follow from shapes. Measured default jobs took between 3/4 and 4/3 of the seconds; others, half to twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.measure.cost import WEIGHT_BYTES, CostModel, LayerSizes, cost_model
from nbl_export.measure.rounds import INTERIM_ROUNDS, Rule
from nbl_export.methods import METHODS
from nbl_export.methods.base import TokenWork
from nbl_export.methods.checkpoint.shape import Shape
from nbl_export.methods.rows import Read, Rows
from nbl_export.model.architectures import exits_refused
from nbl_export.model.memory import WEIGHTS_SHARE
from nbl_export.options.goals import DEFAULT_STEPS, asked_layers, default_minutes, names_layers
from nbl_export.options.option import ModelFacts
from nbl_export.options.options import AUTO_EXIT, CHECKPOINT_FIT, JobOptions, exit_refused
from nbl_export.records.capabilities import Capabilities
from nbl_export.records.destinations import ANYWHERE, DESTINATIONS
from nbl_export.records.plan import PREDICTED_KV
from nbl_export.text.windows import early_stopping_tokens, role_tokens

__all__ = ["Gain", "Job", "Needs", "ProductSpeed", "measure_products"]

# Measured: "smollm2" and "qwen" are stages-*.json, the 8B shape is shapes-8b.json in bench/results.
_FIT = 28.0  # x D^3 of float32 work to score or fit one map, in float64: plan of the 8B shape
_TESTS = 3  # tests of a limit on quality: smollm2 took 3, qwen 2
_PROBED = 36_000  # tokens of all probes of verification: smollm2 and qwen, without the test text
_WRITTEN = 4e8  # bytes a second that an export reads or writes: smollm2 and qwen
_DECODED = 4.0  # prompt tokens that take as long as a decoded token, for each byte of a weight's element: smollm2

_BATCH = 4096  # tokens that calibrate at once, with three float32 activations of the MLP
_PROMPTS = (512, 2048)  # tokens of the prompts whose first token is told
_STEP = 1024  # tokens of a training step
_TWICE = 8192  # tokens of passages that decide an exit layer, beside the validation texts
_SHORT = 2  # times the judged tokens: the short contexts of long-range tokens (`text.long_range`)
_MEASURED_SECONDS = 0.2
_SUMS = 14 / 3  # x D^2 additions and multiplications of a token's moments: Y'X, and 2/3 of X'X and Y'Y (`sums.gram`)


@dataclass(frozen=True)
class ProductSpeed:
    """Speed of float32 products on this machine.

    Attributes:
        flops_per_second: additions and multiplications a second of all threads, if nothing else runs.
        share: of the time of these threads that other programs left to them, at most 1.
    """

    flops_per_second: float
    share: float


@functools.cache  # each process measures once
def measure_products(threads: int) -> ProductSpeed:
    """Multiply small matrices in every thread for a fifth of a second.

    A thread's own clock stands still while another program has its core, so that load does not change the rate.
    BLAS gives no product of this size to threads of its own, whose clocks are not read.
    """
    side = 64
    together = threading.Barrier(threads)

    def work(_thread: int) -> tuple[int, float, float]:
        x = np.random.default_rng(0).standard_normal((side, side), np.float32)
        out = np.empty_like(x)
        together.wait()
        begin, own, count = time.perf_counter(), time.thread_time(), 0
        while time.perf_counter() - begin < _MEASURED_SECONDS:
            for _ in range(16):
                np.matmul(x, x, out=out)
            count += 16
        return count, time.thread_time() - own, time.perf_counter() - begin

    with ThreadPoolExecutor(threads) as pool:
        counts, own, passed = zip(*pool.map(work, range(threads)), strict=True)
    rates = (2.0 * side**3 * count / seconds for count, seconds in zip(counts, own, strict=True))
    return ProductSpeed(sum(rates), min(1.0, sum(own) / sum(passed)))


@dataclass(frozen=True)
class Needs:
    """What a stage takes.

    Attributes:
        memory_bytes: the least that it can run with, beside Python and its libraries.
        disk_bytes: that it leaves in the run directory.
    """

    stage: str
    seconds: float
    memory_bytes: float
    disk_bytes: float


@dataclass(frozen=True)
class Gain:
    """The first token of a prompt, by counted work.

    Attributes:
        kind: what `layers` layers have.
        is_asked: of the job itself; else of a job with the default exit layer.
        speedup: work of the original over work of the model that is made.
    """

    kind: str
    layers: int
    is_asked: bool
    tokens: int
    speedup: float


@dataclass(frozen=True)
class Job:
    """A job that is estimated.

    Attributes:
        options: settled.
        product_flops_per_second: additions and multiplications a second of a float32 product here.
        tiles: layers are calibrated and chosen by bfloat16 products of AMX, at twice this rate.
        available_bytes: memory.
    """

    shape: Shape
    options: JobOptions
    engine: Capabilities
    product_flops_per_second: float
    tiles: bool
    available_bytes: int

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
        """Bytes of a graph. Its embedding stays in float32, or float16, unless the head is the same matrix."""
        s = self.shape
        precision = self.options.precision
        size = WEIGHT_BYTES[precision]
        is_one = s.tied and precision not in self.engine.balanced
        table = 0 if is_one else s.head_parameters * (2 if precision in ("fp16", "bf16") else 4)
        return (s.parameters_of_layers + s.head_parameters) * size + table

    @property
    def moments(self) -> float:
        """Bytes of sums.safetensors: a matrix of float64 for each layer and tap, and half of two symmetric ones."""
        taps = len({"residual", self.options.tap})
        return 16.0 * self.shape.decoder.hidden_size**2 * self.shape.decoder.num_layers * taps

    @property
    def exits(self) -> tuple[int, ...]:
        """Exit layers that are calibrated."""
        if not self.options.predicts:
            return ()
        candidates: Any = METHODS[self.options.method].candidates(self.options, self.shape.decoder, {})
        found: tuple[int, ...] = candidates.exits
        return found

    @property
    def _map_elements(self) -> int:
        """Of a map that predicts keys and values of a layer."""
        d = self.shape.decoder
        return 2 * d.num_kv_heads * d.head_dim * 2 * d.hidden_size

    @property
    def _exit_sums(self) -> float:
        """Numbers in the sums of all candidate exit layers: X'X, and Y'X of each layer above."""
        d = self.shape.decoder
        return sum((2.0 * d.hidden_size) ** 2 + (d.num_layers - c) * self._map_elements for c in self.exits)

    @functools.cached_property
    def count(self) -> int:
        """Layers that are replaced: as asked, or a quarter of them if a goal decides; a third have predicted KV."""
        decoder = self.shape.decoder
        if self.options.predicts:
            exit_layer = self.options.exit_layer
            return round(decoder.num_layers / 3) if exit_layer == AUTO_EXIT else decoder.num_layers - int(exit_layer)
        if self.options.layers is not None:
            layers = asked_layers(self.options, decoder)
            return layers if isinstance(layers, int) else len(layers)
        return max(1, round(decoder.num_layers / 4))

    # -- time ----------------------------------------------------------------------------------------------------

    def _pass(self, tokens: int, depth: int = 0) -> float:
        """Work of tokens in the original, with the logits of the last one."""
        plain = CostModel(self.shape.decoder, self.shape.mlp, 4, 4, 4, tail_pruned=False)
        return plain.prefill({}, tokens, depth).flops

    @functools.cached_property
    def _hidden(self) -> float:
        """Work of one token in windows of the context, without its logits."""
        return self._pass(self.options.context) / self.options.context

    @property
    def _token(self) -> float:
        """The same, with its logits."""
        return self._hidden + 2.0 * self.shape.head_parameters

    @property
    def _torch_rate(self) -> float:
        return self.product_flops_per_second * (2 if self.tiles else 1)

    @property
    def trains(self) -> bool:
        """Whether maps are trained, which needs the whole model in memory."""
        return self.options.fit == "distilled" and self.fits

    @property
    def _tested(self) -> float:
        """Work of the tests of a limit on quality: validation texts in the original and half of the replaced model."""
        options = self.options
        return 0 if options.layers else 1.5 * _TESTS * role_tokens("validation", options.context) * self._token

    def _planned(self) -> float:
        """Work of the choice of layers."""
        options = self.options
        layers = self.shape.decoder.num_layers
        judged = early_stopping_tokens(self.options.context)
        work = 0.0 if self.trains else self._tested
        if options.select != "cca" and not names_layers(options.layers):
            tokens = judged * (layers / 2 + 0.75 * self.count)  # each layer alone; one or two candidates of each step
            work += tokens * self._token
        return work + _FIT * self.shape.decoder.hidden_size * self.moments / 16

    def _exit_chosen(self) -> float:
        """Work of the choice of an exit layer: layers above it run twice, with their own keys and with predicted
        ones."""
        if self.options.exit_layer != AUTO_EXIT:
            return 0.0
        judged = early_stopping_tokens(self.options.context)
        validation = role_tokens("validation", self.options.context) + _TWICE
        tried = math.ceil(math.log2(len(self.exits) + 1)) + 1  # by halves, and one with more recent tokens
        above = self.count / self.shape.decoder.num_layers
        passes = (1 + _SHORT) * (judged + validation) + 2 * above * (tried * judged + validation)
        logits = 2 * (tried * judged / 2 + validation) + 2 * (judged + validation)
        return passes * self._hidden + logits * (self._token - self._hidden)

    def _trained(self) -> float:
        """Seconds of training."""
        minutes = self.options.distill_minutes
        steps = self.options.distill_steps
        if minutes is None and steps is None:
            minutes, steps = (default_minutes(self.shape.parameters), None) if self._tested else (None, DEFAULT_STEPS)
        step = 3 * _STEP * self._token / self._torch_rate
        return min(60 * (minutes or math.inf), step * (steps or math.inf))

    def _verified(self) -> float:
        """Work of the checks, and of the test text in both graphs; with an exit layer, half of a window is judged."""
        passes = 2 + _SHORT * (0.5 if self.exits else 1)
        return (passes * role_tokens("test", self.options.context) + _PROBED) * self._token

    def _timed(self) -> float:
        """Seconds of the benchmark."""
        options = self.options
        work = 0.0
        for depth in options.depths:
            work += self._pass(depth) + 2 * sum(self._pass(n, depth) for n in options.prompt_tokens)
            work += (options.generate_tokens or 64) * _DECODED * WEIGHT_BYTES[options.precision] * self._token
        load = 2 * (self.graph / _WRITTEN + work / self.product_flops_per_second)  # of both graphs
        usual = max([INTERIM_ROUNDS[0], *(count for count in INTERIM_ROUNDS if count * load <= Rule().seconds)])
        return (options.repetitions or usual) * load

    # -- the whole -----------------------------------------------------------------------------------------------

    def needs(self) -> tuple[Needs, ...]:
        """Each stage that the job runs, in order."""
        s = self.shape
        d = self.shape.decoder
        options = self.options
        graph = self.graph
        rate = self.product_flops_per_second
        read = options.calibration_tokens
        is_rounded = options.precision not in ("fp32", "fp16", "bf16")
        has_maps = options.fit == CHECKPOINT_FIT
        converted = self.weights if s.is_gguf or s.maps_tap else 0.0
        exported = self.weights
        if options.precision in self.engine.mapped.get(options.decoder_source, ()):
            exported = 12.0 * s.head_parameters if options.precision in self.engine.rounded else 0.0
        if self.exits:
            sums = 2 * read * self._exit_sums
            kept = 8.0 * self._exit_sums
            planned = self._exit_chosen()
            held = self.weights + kept
            selection = self.weights
            maps = 4.0 * self.count * self._map_elements
        else:
            sums = _SUMS * read * self.moments / 16
            kept = self.moments
            planned = self._planned()
            layer = 4.0 * s.layer_parameters  # one at a time is in memory, if memory is short
            held = max(layer + 4.5 * kept / d.num_layers + 12.0 * _BATCH * s.mlp.active, s.is_gguf * self.weights)
            selection = 80.0 * d.hidden_size**2
            maps = 4.0 * self.count * d.hidden_size**2
        stages = (
            Needs("calibrate", read * self._hidden / self._torch_rate + sums / rate, held, kept + converted),
            Needs("plan", planned / self._torch_rate, selection, maps),
            Needs("distill", self._trained() + self._tested / self._torch_rate, self.weights, maps),
            Needs(
                "decoder",
                (self.weights * (2 if is_rounded else 1) + graph) / _WRITTEN,
                graph + exported,
                graph + (converted if has_maps else 0.0),
            ),
            Needs("rewrite", graph / _WRITTEN, 0.0, graph),
            Needs("verify", self._verified() / rate, graph if is_rounded else 0.0, 0.0),
            Needs("bench", self._timed(), graph, 0.0),
        )
        left_out = {"calibrate", "plan"} if has_maps else set()
        left_out |= set() if self.trains else {"distill"}
        left_out |= {"bench"} if self.engine.needs_target_gpu else set()
        return tuple(needs for needs in stages if needs.stage not in left_out)

    def gains(self) -> tuple[Gain, ...]:
        """What the kind of the job gives for prompts, and what predicted KV would give, if they are another kind.

        The named layers, or `count` layers in the middle, are replaced. The upper `count` layers have predicted KV.
        """
        other = self._with_exit()
        most = self.shape.decoder.max_positions
        jobs = [(self, True), *([(other, False)] if other else [])]
        return tuple(one._gain(tokens, own) for one, own in jobs for tokens in sorted({min(n, most) for n in _PROMPTS}))

    def _gain(self, tokens: int, is_asked: bool) -> Gain:
        costs = cost_model(self.options, self.engine, self.shape.decoder, self.shape.mlp)
        costs = dataclasses.replace(costs, tokens=tokens)
        work = [costs.prefill_flops(sizes) for sizes in ({}, self._exit_sizes() if self.exits else self._layer_sizes())]
        kind = "predicted KV" if self.exits else "linear maps" if self.options.fit != "drop" else "no attention"
        return Gain(kind, self.count, is_asked, tokens, work[0] / work[1])

    @property
    def no_exit(self) -> str:
        """Why keys of this model cannot be predicted in the asked engine; "" if they can."""
        place = DESTINATIONS.get(self.options.destination or "", ANYWHERE)
        if place.kinds is not None and PREDICTED_KV not in place.kinds:
            return f"--for {self.options.destination} takes none"
        if not self.engine.holds(PREDICTED_KV):
            return f"--engine {self.options.engine} takes none"
        decoder = self.shape.decoder
        facts = ModelFacts(no_exit=exits_refused(decoder.architecture, has_window=bool(decoder.sliding_window)))
        return exit_refused(self.options.decoder_source, self.options.precision, facts, self.options.destination)

    def _exit_sizes(self) -> dict[int, LayerSizes]:
        layers = self.shape.decoder.num_layers
        exit_layer = layers - self.count
        work = TokenWork(self._map_elements, self._map_elements)
        reads = Read(rows=Rows.LAST, tokens=self.options.recent_choices[0]), Read(exit_layer, Rows.ALL)
        return dict.fromkeys(range(exit_layer, layers), LayerSizes(reads, (TokenWork(0, 0), work), attends=True))

    def _layer_sizes(self) -> dict[int, LayerSizes]:
        decoder = self.shape.decoder
        options = self.options
        first = (decoder.num_layers - self.count) // 2
        named = asked_layers(options, decoder) if options.layers else self.count
        layers = range(first, first + self.count) if isinstance(named, int) else named
        elements = 0 if options.fit == "drop" else decoder.hidden_size**2
        return dict.fromkeys(layers, LayerSizes((Read(),), (TokenWork(elements, elements),)))

    def _with_exit(self) -> Job | None:
        """The same job with the default exit layer; None if it has one, or if its engine or model takes none."""
        if self.options.predicts or self.no_exit or self.shape.maps_tap:
            return None
        options = dataclasses.replace(
            self.options, exit_layer=AUTO_EXIT, layers=None, fit="independent", recent_tokens=None
        )
        return dataclasses.replace(self, options=options)
