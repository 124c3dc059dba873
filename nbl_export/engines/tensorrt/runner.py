"""Runs a plan on the GPU: two contexts (prefill, decode), caches bound once, the decode step as a CUDA graph.

    engine ─┬─ context 0, profile 0 (1..chunk tokens)  ─┐     input_ids, write_indices, num_tokens, logits: one buffer
            └─ context 1, profile 1 (1 token)          ─┴──   each; past.i and present.i: the same address in both

A context keeps its profile and its shapes, so the captured decode step stays valid: only input values change.
present.i must be bound to the address of past.i (TensorRT documentation, "KVCacheUpdate": the cache is updated in
place). TensorRT for RTX captures CUDA graphs by itself, with one setting (`IRuntimeConfig.cuda_graph_strategy`),
because it swaps kernels while it warms up. For TensorRT this module captures the step after one ordinary run, as
TensorRT's documentation asks.

Written against the documented API of TensorRT 10.15 to 11 and TensorRT-RTX 1.7. The README says what has run where.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.engines.gpu import Gpu, find_gpu
from nbl_export.engines.static.schedule import profile_for
from nbl_export.engines.tensorrt.contexts import DEFAULT, Strategy
from nbl_export.engines.tensorrt.device import Device, open_device
from nbl_export.engines.tensorrt.library import Library, load_library
from nbl_export.engines.tensorrt.log import complaints, messages_of
from nbl_export.engines.tensorrt.record import ENGINE_FILE, EngineRecord, read_plan, read_record
from nbl_export.errors import NblError
from nbl_export.records.decoder import ITEMSIZE, TensorInfo

__all__ = ["TrtSession", "open_session", "refuse_misfit"]

log = logging.getLogger(__name__)

_INDEX = np.dtype(np.int64)
_PER_ROW = ("write_indices", "num_tokens")


def open_session(library: Library, directory: Path, strategy: Strategy = DEFAULT) -> TrtSession:
    """A session on an engine directory.

    Raises:
        NblError: there is no engine, library, version or GPU do not fit, or device memory cannot be reached.
        CorruptError: the plan is cut short or damaged.
    """
    record = read_record(directory)
    trt = load_library(library)
    refuse_misfit(library, record, trt.__version__, find_gpu(), directory)
    return TrtSession(library, directory, record, trt, open_device(), strategy)


def refuse_misfit(library: Library, record: EngineRecord, version: str, gpu: Gpu | str, directory: Path) -> None:
    """Refuse a plan that this library or this GPU does not take; the message names both and the remedy.

    Raises:
        NblError: engine, version or compute capability differ, or there is no GPU.
    """
    name, title = library.capabilities.name, library.capabilities.title
    again = f"build it again here: nbl-export build DIR --engine {name}"
    if record.engine != name:
        raise NblError(f"{directory} holds an engine of {record.engine}, not of {name}; {again}")
    if record.version != version:
        raise NblError(
            f"{directory} was built by {library.package} {record.version}, and {version} is installed, which does not "
            f"take it; {again}, or pip install {library.package}=={record.version}"
        )
    if isinstance(gpu, str):
        raise NblError(f"{directory} cannot run here: {gpu}")
    if not library.runs_on(gpu.compute):
        raise NblError(
            f"{title} does not run on the {gpu.name}, whose compute capability is {gpu.compute}; "
            f"use --engine {library.other}"
        )
    if gpu.compute not in record.compute_capabilities:
        built = ", ".join(record.compute_capabilities)
        raise NblError(
            f"{directory} was built for compute capability {built}, and the {gpu.name} has {gpu.compute}; {again}"
        )


class TrtSession:
    """A plan and the caches of a batch (a `host.Session`).

    Args:
        trt: the imported library.
        device: owns all memory; closed with the session.
    """

    def __init__(
        self, library: Library, directory: Path, record: EngineRecord, trt: Any, device: Device,
        strategy: Strategy = DEFAULT,
    ) -> None:  # fmt: skip
        self.contract = record.contract
        self.slots = record.max_seq_len
        self.chunk = record.prefill_chunk
        self._library, self._record, self._trt, self._device = library, record, trt, device
        self._graphs = strategy.graphs
        self._runtime, self._engine = _deserialize(library, directory, record, trt)
        self._decode = len(record.profiles) - 1
        self._contexts = [self._context(index) for index in range(len(record.profiles))]
        self._batch = 0
        self._caches: dict[str, tuple[int, int]] = {}
        self._step = _CapturedStep(device, library.runtime_graphs or not self._graphs)
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._logits = next(info for info in record.outputs if info.name == "logits")
        self._buffers = self._allocate_controls()

    # -- set up ----------------------------------------------------------------------------------------

    def _context(self, profile: int) -> Any:
        """An execution context that stays on one profile."""
        engine = self._engine
        if self._library.runtime_graphs and profile == self._decode and self._graphs:
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise NblError("the GPU has no memory left for the engine; use a smaller --prefill-chunk or --max-seq-len")
        _check(context.set_optimization_profile_async(profile, self._device.stream), "an optimisation profile")
        return context

    def _allocate_controls(self) -> dict[str, int]:
        """Buffers of the small inputs and of the logits, for the largest step."""
        rows = max(p.batch[2] for p in self._record.profiles)
        tokens = max(p.tokens[2] for p in self._record.profiles)
        names = {info.name for info in self.contract.inputs}
        sizes: dict[str, int] = {n: rows * _INDEX.itemsize for n in _PER_ROW if n in names}
        sizes["input_ids"] = rows * tokens * _INDEX.itemsize
        sizes["logits"] = rows * (1 if self._last_only else tokens) * int(self._logits.shape[-1]) * 4
        return {name: self._device.allocate(size) for name, size in sizes.items()}

    @property
    def _last_only(self) -> bool:
        return self._logits.shape[1] == 1

    # -- session ---------------------------------------------------------------------------------------

    def begin(self, batch: int) -> None:
        """Zero the caches for a batch; allocate and bind them if the batch size changes."""
        if batch != self._batch:
            profile_for(self._record.profiles, batch, 1)
            self._bind(batch)
        for address, size in self._caches.values():
            self._device.zero(address, size)

    def _bind(self, batch: int) -> None:
        caches = [info for info in self.contract.inputs if info.name.startswith("past_key_values.")]
        for info in caches:
            size = _bytes(info, batch)
            if self._caches.get(info.name, (0, 0))[1] < size:
                self._caches[info.name] = (self._device.allocate(size), size)
        self._batch, self._shapes = batch, {}
        self._step = _CapturedStep(self._device, self._library.runtime_graphs or not self._graphs)
        for context in self._contexts:
            for name, address in self._buffers.items():
                _check(context.set_tensor_address(name, address), f"the address of {name}")
                if name in _PER_ROW:
                    _check(context.set_input_shape(name, (batch,)), f"the shape of {name}")
            for info in caches:
                address, _ = self._caches[info.name]
                for name in (info.name, info.name.replace("past_key_values", "present")):
                    _check(context.set_tensor_address(name, address), f"the address of {name}")
                _check(context.set_input_shape(info.name, (batch, *info.shape[1:])), f"the shape of {info.name}")

    def run(self, ids_BT: np.ndarray, writes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Run one step; returns float32 logits."""
        batch, tokens = ids_BT.shape
        index = profile_for(self._record.profiles, batch, tokens)
        context = self._contexts[index]
        controls = {"input_ids": ids_BT, "write_indices": np.array(writes, _INDEX),
                    "num_tokens": np.array(counts, _INDEX)}  # fmt: skip
        kept = {name: np.ascontiguousarray(a, _INDEX) for name, a in controls.items() if name in self._buffers}
        for name, array in kept.items():
            self._device.upload(self._buffers[name], array)
        if self._shapes.get(index) != (batch, tokens):
            _check(context.set_input_shape("input_ids", (batch, tokens)), "the shape of input_ids")
            self._shapes[index] = (batch, tokens)
        self._launch(index, tokens)
        return self._download(batch, tokens)

    def _launch(self, index: int, tokens: int) -> None:
        context = self._contexts[index]

        def execute() -> None:
            _check(context.execute_async_v3(self._device.stream), "a step")

        if index == self._decode and tokens == 1:
            self._step.run(execute)
        else:
            execute()

    def _download(self, batch: int, tokens: int) -> np.ndarray:
        shape = (batch, 1 if self._last_only else tokens, int(self._logits.shape[-1]))
        raw = np.empty(shape, _HOST_DTYPES[self._logits.dtype])
        self._device.download(self._buffers["logits"], raw)
        self._device.synchronize()
        if self._logits.dtype == "bfloat16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take."""
        return sum(_bytes(i, self._batch) for i in self.contract.inputs if i.name.startswith("past_key_values."))

    def close(self) -> None:
        """Free contexts and engine, then all memory."""
        self._contexts = []
        self._engine = self._runtime = None
        self._device.close()


class _CapturedStep:
    """The decode step: run once, then captured and replayed; without capture, always run as is."""

    def __init__(self, device: Device, captured_elsewhere: bool) -> None:
        self._device = device
        self._plain = captured_elsewhere
        self._warm = False
        self._replay: Callable[[], None] | None = None

    def run(self, execute: Callable[[], None]) -> None:
        """Run `execute`, or its captured graph; the work of `execute` is the same every time."""
        if self._warm and not self._plain and self._replay is None:
            try:
                self._replay = self._device.capture(execute)
            except NblError as error:
                log.warning("the decode step is not captured as a CUDA graph: %s", error)
                self._plain = True
        self._warm = True
        (self._replay or execute)()


_HOST_DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def _deserialize(library: Library, directory: Path, record: EngineRecord, trt: Any) -> tuple[Any, Any]:
    """Runtime and engine; the runtime must outlive the engine. The loaded bytes are the hashed bytes."""
    messages = messages_of(trt)
    plan = read_plan(directory, record)
    with messages.collected() as said:
        runtime = trt.Runtime(messages.logger)
        runtime.engine_host_code_allowed = False  # a plan may hold a library for the host; the default, made explicit
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        why = (complaints(said) or ["it gives no reason"])[0]
        raise NblError(
            f"{library.capabilities.title} does not load {directory / ENGINE_FILE}: {why[:300]}; build it again here: "
            f"nbl-export build DIR --engine {library.capabilities.name}"
        )
    return runtime, engine


def _bytes(info: TensorInfo, batch: int) -> int:
    return batch * int(np.prod([int(n) for n in info.shape[1:]])) * ITEMSIZE[info.dtype]


def _check(good: bool, what: str) -> None:
    """Refuse if TensorRT returned False; TensorRT logs the reason."""
    if not good:
        raise NblError(f"TensorRT refuses {what}; run with -v to see what it says")
