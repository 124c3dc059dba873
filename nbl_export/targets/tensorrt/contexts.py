"""Makes an execution context for each profile: one block of working memory, one cache of kernels.

    device ── one block, as large as the largest profile needs ──┬─ context 0, profile 0 (prefill)
    kernels.cache ───────────── one cache of kernels ────────────┴─ context 1, profile 1 (decode)

Steps run one after the other on one stream, so both contexts may share the block (`IExecutionContext.set_device_memory`
forbids it only for parallel steps). By default, each context would allocate for the larger profile.

TensorRT-RTX compiles kernels for the shapes that it meets. By default it does so in the background and replaces
kernels while steps run ("DynamicShapesKernelSpecializationStrategy": LAZY). EAGER compiles before the step, so that a
shape is always computed by the same kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbl_export.targets.tensorrt.device import Device
from nbl_export.targets.tensorrt.kernels import KernelCache
from nbl_export.targets.tensorrt.library import Library
from nbl_export.targets.tensorrt.log import Messages, require

__all__ = ["DEFAULT", "Strategy", "make_config", "open_contexts"]


@dataclass(frozen=True)
class Strategy:
    """How a session runs an engine.

    Attributes:
        graphs: whether the decode step runs as a CUDA graph.
        kernels: when TensorRT-RTX compiles kernels for a shape: EAGER (before the step), LAZY (in the background) or
            NONE (never; kernels for all shapes run). TensorRT has compiled them in the plan.
    """

    graphs: bool = True
    kernels: str = "EAGER"


DEFAULT = Strategy()


def open_contexts(
    library: Library, trt: Any, messages: Messages, engine: Any, device: Device, strategy: Strategy,
    kernels: KernelCache | None,
) -> list[Any]:  # fmt: skip
    """A context for each profile of the engine; each stays on its profile.

    Raises:
        NblError: the GPU has no memory left, or the library refuses.
    """
    size = int(engine.device_memory_size_v2)
    block = device.allocate(size) if size else 0
    contexts = []
    with messages.explaining("TensorRT refuses to prepare the engine"):
        cache = None
        count = int(engine.num_optimization_profiles)
        for profile in range(count):
            runtime_config = make_config(library, trt, engine, strategy, decode=profile == count - 1)
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


def make_config(library: Library, trt: Any, engine: Any, strategy: Strategy, *, decode: bool) -> Any:
    """How a context runs: with memory of the user, and kernels and graphs of a strategy.

    Made inside a block of `Messages.explaining`.
    """
    config = require(engine.create_runtime_config(), "a runtime configuration")
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if library.jit:
        graphs, kinds = trt.CudaGraphStrategy, trt.DynamicShapesKernelSpecializationStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if decode and strategy.graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = kinds.__members__[strategy.kernels]
    return config
