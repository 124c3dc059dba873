"""Runs a plan on the GPU: a context for each profile, caches bound once, the decode step as a CUDA graph.

    engine ─┬─ context 0, profile 0 (1..chunk tokens)  ─┐     input_ids, write_indices, num_tokens, logits: one buffer
            ├─ context 1, profile 1 (1 token)          ─┼──   each; past.i and present.i: the same address in all
            └─ context 2, profile 2 (1 token, a batch) ─┘     only if the engine takes more than two rows

A context keeps its profile. The decode context keeps its shapes, so the captured step stays valid: only input values
change. Another batch is captured anew. present.i must be bound to the address of past.i (TensorRT documentation,
"KVCacheUpdate": the cache is updated in place).

Steps run one after the other on one stream, so all contexts share one block of working memory, as large as the largest
profile needs (`IExecutionContext.set_device_memory` forbids it only for parallel steps), and one cache of kernels.

The decode step of TensorRT is captured behind its first run, which TensorRT asks for, and replayed while its shape
stays. TensorRT-RTX captures by itself, behind a run that warms up ("Working with RTX CUDA Graphs").

TensorRT-RTX compiles kernels for the shapes that it meets. By default it does so in the background and replaces
kernels while steps run ("DynamicShapesKernelSpecializationStrategy": LAZY). EAGER compiles before the step, so that a
shape is always computed by the same kernels. Prefill is padded to a few widths, so that few shapes are compiled.

Written against the documented API of TensorRT 10.15 to 11 and TensorRT-RTX 1.7. docs/engines/nvidia.md says what has
run where.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.records.decoder import ITEMSIZE, TensorInfo
from nbl_export.targets.gpu import Gpu, find_gpu
from nbl_export.targets.tensorrt.device import Device, open_device
from nbl_export.targets.tensorrt.kernels import KERNELS_FILE, KernelCache
from nbl_export.targets.tensorrt.library import Library, load_library
from nbl_export.targets.tensorrt.messages import Messages, messages_of, require
from nbl_export.targets.tensorrt.record import ENGINE_FILE, EngineRecord, read_plan, read_record
from nbl_export.targets.tensorrt.static.schedule import profile_for

__all__ = ["DecodeStep", "TrtSession", "open_session", "refuse_misfit"]

log = logging.getLogger(__name__)

_INDEX = np.dtype(np.int64)
_PER_ROW = ("write_indices", "num_tokens")
# That prefill of a library is padded to, which compiles kernels for a shape.
_WIDTHS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048)


def open_session(library: Library, directory: Path) -> TrtSession:
    """A session on an engine directory. TensorRT-RTX keeps its compiled kernels there.

    Raises:
        NblError: there is no engine; library, version or GPU do not fit; or device memory cannot be reached.
        CorruptError: the plan is cut short or damaged.
    """
    record = read_record(directory)
    trt = load_library(library)
    gpu = find_gpu()
    refuse_misfit(library, record, trt.__version__, gpu, directory)
    kernels = KernelCache(directory / KERNELS_FILE) if library.jit else None
    return TrtSession(library, directory, record, trt, open_device(), kernels)


def refuse_misfit(library: Library, record: EngineRecord, version: str, gpu: Gpu | str, directory: Path) -> None:
    """Refuse a plan that this library or this GPU does not take; the message names both and the remedy.

    Raises:
        NblError: engine, version or compute capability differ, or there is no GPU.
    """
    name = library.capabilities.name
    title = library.capabilities.title
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
    if record.gpu and record.gpu != gpu.name:
        log.warning(
            "%s has kernels that were chosen on the %s, and runs on the %s; %s for speed",
            directory,
            record.gpu,
            gpu.name,
            again,
        )


class TrtSession:
    """A plan and the caches of a batch.

    Attributes:
        cache_length: slots of a cache.
        chunk: most tokens of a step.
        widths: ascending widths that a step of several tokens is padded to; empty for none.

    Args:
        trt: the imported library.
        device: owns all memory; closed with the session, also if the session does not open.
        kernels: the file of compiled kernels, or None to keep none.
    """

    def __init__(
        self,
        library: Library,
        directory: Path,
        record: EngineRecord,
        trt: Any,
        device: Device,
        kernels: KernelCache | None = None,
    ) -> None:
        self.contract = record.contract
        self.cache_length = record.max_seq_len
        self.chunk = record.prefill_chunk
        self.kernels = kernels
        self._record = record
        self._device = device
        self._messages = messages_of(trt)
        self._batch = 0
        self._caches: dict[str, tuple[int, int]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._logits = next(info for info in record.outputs if info.name == "logits")
        self.widths: tuple[int, ...] = _WIDTHS if library.jit and self._last_only else ()
        try:
            self._runtime, self._engine = _deserialize(library, directory, record, trt, self._messages)
            self._contexts = _open_contexts(library, trt, self._messages, self._engine, device, kernels)
            self._allocate()
        except BaseException:  # goes on, whatever closing says
            with contextlib.suppress(NblError):
                device.close()
            raise
        self._step = DecodeStep(device, captures=not library.jit)

    # -- set up ----------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        """Buffers of the small inputs and of the logits, for the largest step, on both sides."""
        rows = max(p.batch[2] for p in self._record.profiles)
        tokens = max(p.tokens[2] for p in self._record.profiles)
        names = {info.name for info in self.contract.inputs}
        kind = np.dtype(_HOST_DTYPES[self._logits.dtype])
        size = rows * (1 if self._last_only else tokens) * int(self._logits.shape[-1]) * kind.itemsize
        self._controls = _Controls(self._device, rows, tokens, names)
        self._host_logits = self._device.pinned(size).view(kind)
        self._buffers = {**self._controls.addresses, "logits": self._device.allocate(size)}

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
        self._batch = 0  # until all is bound
        self._shapes = {}
        self._step.reset()
        for info in caches:
            size = batch * int(np.prod([int(n) for n in info.shape[1:]])) * ITEMSIZE[info.dtype]
            if self._caches.get(info.name, (0, 0))[1] < size:
                self._caches[info.name] = (self._device.allocate(size), size)
        with self._messages.explaining(f"TensorRT refuses {batch} rows"):
            for context, profile in zip(self._contexts, self._record.profiles, strict=False):
                if profile.takes(batch, profile.tokens[0]):
                    self._bind_context(context, caches, batch)
        self._batch = batch

    def _bind_context(self, context: Any, caches: Sequence[TensorInfo], batch: int) -> None:
        for name, address in self._buffers.items():
            require(context.set_tensor_address(name, address), f"the address of {name}")
            if name in _PER_ROW:
                require(context.set_input_shape(name, (batch,)), f"the shape of {name}")
        for info in caches:
            address, _ = self._caches[info.name]
            for name in (info.name, info.name.replace("past_key_values", "present")):
                require(context.set_tensor_address(name, address), f"the address of {name}")
            require(context.set_input_shape(info.name, (batch, *info.shape[1:])), f"the shape of {info.name}")

    def run(self, ids_BT: np.ndarray, start: int, count: int) -> np.ndarray:
        """Run one step; returns logits [B, T, V], or [B, 1, V] of each row's last token, as the engine gives them.

        The array is valid until the next step. See `host.widened`.

        Args:
            start: slot of the first token, in every row.
            count: tokens of a row that are not padding.
        """
        batch, tokens = ids_BT.shape
        index = profile_for(self._record.profiles, batch, tokens)
        self._device.upload(*self._controls.filled(ids_BT, start, count))
        execute = functools.partial(self._execute, self._contexts[index], index, (batch, tokens))
        if self._record.profiles[index].decodes:
            self._step.run((batch, tokens), execute)
        else:
            execute()
        shape = (batch, 1 if self._last_only else tokens, int(self._logits.shape[-1]))
        logits = self._host_logits[: int(np.prod(shape))].reshape(shape)
        self._device.download(self._buffers["logits"], logits)
        self._device.synchronize()
        return logits

    def _execute(self, context: Any, index: int, shape: tuple[int, int]) -> None:
        with self._messages.explaining("TensorRT refuses a step"):
            if self._shapes.get(index) != shape:
                self._shapes.pop(index, None)  # unknown if the library refuses
                require(context.set_input_shape("input_ids", shape), "the shape of input_ids")
                self._shapes[index] = shape
            require(context.execute_async_v3(self._device.stream), "a step")

    def close(self) -> None:
        """Keep the compiled kernels, free contexts and engine, then all memory.

        Raises:
            NblError: a failure, after everything has been tried.
        """
        if self.kernels is not None:
            self.kernels.save()
        try:
            self._device.synchronize()
        finally:  # the library's objects are in use until the stream is done
            self._step.reset()
            self._contexts = []
            self._engine = self._runtime = None
            self._device.close()


class _Controls:
    """The small inputs of a step, one behind the other in memory, so that one copy brings them to the device.

    write_indices [B] | num_tokens [B] | input_ids [B, T]      each at a multiple of 256 bytes
    """

    def __init__(self, device: Device, rows: int, tokens: int, names: Collection[str]) -> None:
        places = {name: k * _aligned(rows) for k, name in enumerate(n for n in _PER_ROW if n in names)}
        places["input_ids"] = len(places) * _aligned(rows)
        size = places["input_ids"] + rows * tokens
        self._address = device.allocate(size * _INDEX.itemsize)
        self._host = device.pinned(size * _INDEX.itemsize).view(_INDEX)
        self._places = places
        self.addresses = {name: self._address + place * _INDEX.itemsize for name, place in places.items()}

    def filled(self, ids_BT: np.ndarray, start: int, count: int) -> tuple[int, np.ndarray]:
        """The address on the device, and what is copied there for a step."""
        for name, value in (("write_indices", start), ("num_tokens", count)):
            if name in self._places:
                self._host[self._places[name] : self._places[name] + len(ids_BT)] = value
        place = self._places["input_ids"]
        end = place + ids_BT.size
        self._host[place:end] = ids_BT.reshape(-1)
        return self._address, self._host[:end]


def _aligned(count: int) -> int:
    """Index of the first number behind `count` others at a multiple of 256 bytes, as device memory begins."""
    return -(-count * _INDEX.itemsize // 256) * 256 // _INDEX.itemsize


_HOST_DTYPES = {"float16": np.float16, "float32": np.float32, "bfloat16": np.uint16}


def _deserialize(
    library: Library, directory: Path, record: EngineRecord, trt: Any, messages: Messages
) -> tuple[Any, Any]:
    """Runtime and engine; the runtime must outlive the engine. The loaded bytes are the hashed bytes."""
    plan = read_plan(directory, record)
    again = f"build it again here: nbl-export build DIR --engine {library.capabilities.name}"
    with messages.explaining(f"{library.capabilities.title} does not load {directory / ENGINE_FILE}", again):
        runtime = trt.Runtime(messages.logger)
        # a plan may hold a library for the host; the default, made explicit
        runtime.engine_host_code_allowed = False
        return runtime, require(runtime.deserialize_cuda_engine(plan))


# -- contexts ------------------------------------------------------------------------------------------


def _open_contexts(
    library: Library, trt: Any, messages: Messages, engine: Any, device: Device, kernels: KernelCache | None
) -> list[Any]:
    """A context for each profile of the engine; each stays on its profile.

    Raises:
        NblError: the GPU has no memory left, or the library refuses.
    """
    size = int(engine.device_memory_size_v2)
    block = device.allocate(size) if size else 0
    contexts = []
    with messages.explaining("TensorRT refuses to prepare the engine"):
        cache = None
        for profile in range(int(engine.num_optimization_profiles)):
            runtime_config = _make_config(library, trt, engine, decode=profile > 0)
            if library.jit and kernels is not None and profile == 0:
                cache = kernels.open(runtime_config)
            if cache is not None:
                require(runtime_config.set_runtime_cache(cache), "a cache of kernels")
            context = require(engine.create_execution_context(runtime_config), "a context for the engine")
            if size:
                context.set_device_memory(block, size)
            require(context.set_optimization_profile_async(profile, device.stream), "an optimisation profile")
            contexts.append(context)
    return contexts


def _make_config(library: Library, trt: Any, engine: Any, *, decode: bool) -> Any:
    """How a context runs: with memory of the user, kernels before their step, and decode as a CUDA graph.

    Made inside a block of `Messages.explaining`.
    """
    config = require(engine.create_runtime_config(), "a runtime configuration")
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if library.jit:
        graphs = trt.CudaGraphStrategy
        kinds = trt.DynamicShapesKernelSpecializationStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if decode else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER
    return config


# -- the decode step -----------------------------------------------------------------------------------


class DecodeStep:
    """Runs the decode step of a session.

    Args:
        captures: whether the step is captured here; TensorRT-RTX captures by itself.
    """

    def __init__(self, device: Device, *, captures: bool) -> None:
        self._device = device
        self._captures = captures
        self._shape: tuple[int, ...] | None = None
        self._replay: Callable[[], None] | None = None

    def reset(self) -> None:
        """Forget the graph, because addresses change."""
        self._shape = self._replay = None

    def run(self, shape: tuple[int, ...], execute: Callable[[], None]) -> None:
        """Run `execute`, or its captured graph.

        Args:
            shape: of the step's tokens; a graph of another shape is forgotten.
            execute: puts the step on the stream, the same work whenever `shape` is the same.
        """
        if shape == self._shape:
            (self._replay or execute)()
            return
        self.reset()
        execute()
        if self._captures:
            try:
                self._replay = self._device.capture(execute)
            except NblError as error:
                log.warning("the decode step runs without a CUDA graph, which is slower: %s", error)
                self._captures = False
        self._shape = shape
