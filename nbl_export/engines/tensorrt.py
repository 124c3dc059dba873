"""TensorRT and TensorRT for RTX: what differs between them, as data, and what works on this machine.

                 trt                                     trt-rtx
    builds       for the GPU it finds, kernels timed     anywhere, no GPU; kernels are compiled when it is loaded
    runs on      compute capability 7.5 and later        7.5, 8.0, 8.6, 8.9, 12.x; not 9.0, 10.x
    CUDA graph   we capture the decode step              captured by the runtime, one setting

Same API, same code (`trt_build`, `trt_runner`). Sources: NVIDIA's support matrices; "CPU-Only AOT and TensorRT-RTX
Engines" (a plan runs on 8.0, 8.6, 8.9, 12.0 and later unless told otherwise, 7.5 must be asked for); "Working
with RTX CUDA Graphs"; TensorRT's prerequisites (CUDA 13 packages need driver R580, CUDA 12 ones R535).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nbl_export.engines.base import Availability, Capabilities
from nbl_export.engines.gpu import Gpu, find_gpu
from nbl_export.engines.onnx_decoder import GRAPH_FILE, all_logits_file
from nbl_export.engines.static_host import StaticDecoder, StaticRunner
from nbl_export.errors import NblError
from nbl_export.records import DecoderSpec

if TYPE_CHECKING:
    from nbl_export.engines.engine_record import EngineRecord
    from nbl_export.engines.trt_build import BuildSettings, Progress

__all__ = ["LIBRARIES", "TRT", "TRT_RTX", "Engine", "Library", "load_library"]

_CHECKED_CHUNK = 24  # tokens; so that verification crosses chunk borders
_DRIVERS = {13: "R580", 12: "R535"}  # oldest driver of a CUDA major version


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    module: what is imported. package: what pip calls it. get_it: how it is had. computes: compute capabilities that
    it runs on (empty: `least_compute` and later). default_targets: those a plan is for unless told otherwise
    (empty: the GPU at hand). target_prefix: of the library's names for them. weak_computes: those without
    bf16 and int4. runtime_graphs: it captures CUDA graphs by itself. other: the engine to try instead.
    """

    capabilities: Capabilities
    module: str
    package: str
    get_it: str
    builds_without_gpu: bool
    runtime_graphs: bool
    computes: tuple[str, ...]
    least_compute: str
    default_targets: tuple[str, ...]
    other: str
    target_prefix: str = "SM"
    weak_computes: tuple[str, ...] = ("7.5",)

    def runs_on(self, compute: str) -> bool:
        """Whether the library has kernels for a compute capability."""
        if self.computes:
            return compute in self.computes
        return _version(compute) >= _version(self.least_compute)


_PRECISIONS = ("fp16", "bf16", "int4")
_COMPILED: dict[str, Any] = {"static": True, "cross": True, "dense_caches": True}

LIBRARIES = {
    "trt": Library(
        capabilities=Capabilities("trt", "TensorRT", _PRECISIONS, ("static",), "trt", _PRECISIONS, **_COMPILED),
        module="tensorrt",
        package="tensorrt",
        get_it="pip install tensorrt (its libraries come from NVIDIA's own package index)",
        builds_without_gpu=False,
        runtime_graphs=False,
        computes=(),
        least_compute="7.5",
        default_targets=(),
        other="trt-rtx",
    ),
    "trt-rtx": Library(
        capabilities=Capabilities(
            "trt-rtx", "TensorRT for RTX", _PRECISIONS, ("static",), "trt-rtx", _PRECISIONS, **_COMPILED
        ),
        module="tensorrt_rtx",
        package="tensorrt-rtx",
        get_it="pip install tensorrt-rtx",
        builds_without_gpu=True,
        runtime_graphs=True,
        computes=("7.5", "8.0", "8.6", "8.9", "12.0", "12.1"),
        least_compute="7.5",
        default_targets=("8.0", "8.6", "8.9", "12.0", "12.1"),
        other="trt",
    ),
}


def load_library(library: Library) -> ModuleType:
    """The imported module.

    Raises:
        NblError: it is not installed, or does not load; says how to get it.
    """
    if importlib.util.find_spec(library.module) is None:
        raise NblError(f"the package {library.package} is not installed: {library.get_it}")
    try:
        return importlib.import_module(library.module)
    except Exception as error:  # a package without its libraries raises FileNotFoundError, OSError, ImportError
        raise NblError(f"the package {library.package} does not load ({error}): {library.get_it}") from error


class Engine:
    """What an engine module offers, for one of the two libraries."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.CAPABILITIES = library.capabilities

    def probe(self) -> Availability:
        """Whether this machine can build an engine: by building one of two numbers. Never raises."""
        library = self.library
        try:
            trt = load_library(library)
            where = "without a GPU"
            if not library.builds_without_gpu:
                gpu = _usable_gpu(library)
                where = f"for the {gpu.name}"
            _build_known_answer(trt)
            runs = self.probe_run()
            reason = runs.reason if runs.available else f"engines do not run here: {runs.reason}"
            return Availability(True, f"{library.package} {trt.__version__} builds {where}; {reason}")
        except NblError as error:
            return Availability(False, f"{error}{self._advice()}")
        except Exception as error:  # whatever a broken installation raises is the answer
            text = " ".join(str(error).split())[:300]
            return Availability(False, f"{library.package} is installed and does not build: {text}{self._advice()}")

    def probe_run(self) -> Availability:
        """Whether this machine can run an engine. Never raises."""
        from nbl_export.engines.device import find_backend

        library = self.library
        try:
            trt = load_library(library)
            gpu = _usable_gpu(library)
            backend = find_backend()
            if isinstance(backend, str):
                return Availability(False, backend)
            found = f"{library.package} {trt.__version__} runs on the {gpu.name} ({gpu.compute})"
            return Availability(True, f"{found}, memory by {backend.title}")
        except NblError as error:
            return Availability(False, str(error))
        except Exception as error:
            return Availability(False, " ".join(str(error).split())[:300])

    def library_version(self) -> str:
        """Of the installed package, without loading it; empty where there is none."""
        try:
            return importlib.metadata.version(self.library.package)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def default_threads(self) -> int:
        """The host only feeds the GPU."""
        return 1

    def check_model(self, spec: DecoderSpec, precision: str) -> None:
        """Refuse a decoder whose attention has no kernel; loads nothing.

        Raises:
            NblError: with the size that has none.
        """
        from nbl_export.engines.trt_network import refuse_without_kernel_for

        refuse_without_kernel_for(spec.num_heads, spec.head_dim, precision)

    def build(self, source: Path, out: Path, settings: BuildSettings, progress: Progress | None = None) -> EngineRecord:
        """See `trt_build.build_engine`."""
        from nbl_export.engines.trt_build import build_engine

        return build_engine(self.library, source, out, settings, progress)

    def _advice(self) -> str:
        return "" if self.library.builds_without_gpu else f"; --engine {self.library.other} builds without a GPU"

    def open_runner(self, directory: Path, threads: int | None = None) -> StaticRunner:
        """A text runner on a directory with a plan and engine.json. `threads` is for engines on a CPU."""
        from nbl_export.engines.trt_runner import open_session

        return StaticRunner(open_session(self.library, directory), directory)

    def open_graph(self, directory: Path, spec: DecoderSpec, file: str | None = None) -> StaticDecoder:
        """A float32 twin on ONNX Runtime's CPU provider, that with all logits unless another is named."""
        from nbl_export.engines.static_decoder import open_decoder

        return open_decoder(directory / (file or all_logits_file(directory)), _CHECKED_CHUNK)

    def open_checked(self, directory: Path, threads: int | None = None) -> StaticRunner:
        """A text runner on the same twin with the logits that ship."""
        from nbl_export.engines.static_decoder import open_runner

        return open_runner(directory / GRAPH_FILE, _CHECKED_CHUNK, threads)


TRT = Engine(LIBRARIES["trt"])
TRT_RTX = Engine(LIBRARIES["trt-rtx"])


def _usable_gpu(library: Library) -> Gpu:
    """The GPU, if library and driver fit it.

    Raises:
        NblError: no GPU, one that the library has no kernels for, or a driver older than the library needs.
    """
    gpu = find_gpu()
    title = library.capabilities.title
    if isinstance(gpu, str):
        raise NblError(gpu)
    if not library.runs_on(gpu.compute):
        known = ", ".join(library.computes) or f"{library.least_compute} and later"
        raise NblError(
            f"{title} does not run on the {gpu.name}: its compute capability is {gpu.compute}, {title} is for {known}; "
            f"use --engine {library.other}"
        )
    needed = _cuda_major(library)
    if needed is not None and gpu.cuda[0] < needed:
        raise NblError(
            f"the NVIDIA driver supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, the installed {library.package} needs CUDA "
            f"{needed}: update the driver to {_DRIVERS[needed]} or later, or install {library.package}-cu{gpu.cuda[0]}"
        )
    return gpu


def _cuda_major(library: Library) -> int | None:
    """CUDA version that the installed wheels are for: the distribution is called package-cuN."""
    for major in sorted(_DRIVERS, reverse=True):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{library.package}-cu{major}")
            return major
    return None


def _version(compute: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute.split("."))


@functools.cache
def _build_known_answer(trt: Any) -> None:
    """Build y = x + x. Raises what the library raises, or NblError where it gives no plan."""
    from nbl_export.engines.trt_log import messages_of

    log = messages_of(trt)
    with log.collected() as said:
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float16, (1, 2))
        total = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
        network.mark_output(total)
        plan = builder.build_serialized_network(network, builder.create_builder_config())
    if plan is None:
        raise NblError(f"{trt.__name__} {trt.__version__} builds nothing: {'; '.join(m.text for m in said)[:300]}")
