"""TensorRT and TensorRT for RTX: their differences as data, and what works on this machine.

                 trt                                     trt-rtx
    builds       for the GPU it finds, kernels timed     anywhere, no GPU; kernels are compiled when the engine loads
    runs on      compute capability 7.5 and later        8.0, 8.6, 8.9, 12.x; not 7.5, 9.0, 10.x
    CUDA graph   our runner captures the decode step     the library captures, one setting

Both have the same API and run the same code (`build`, `runner`). Sources: NVIDIA's support matrices; "CPU-Only AOT and
TensorRT-RTX Engines" (a plan runs on 8.0, 8.6, 8.9, 12.0 and later by default); "Working with RTX CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import EXIT_ROWS, GRAPH_FILE, all_logits_file
from nbl_export.targets.base import Availability, Builds, BuildSettings, DecoderFacts, ExportSettings
from nbl_export.targets.export.finish import check_bounds
from nbl_export.targets.gpu import CUDA, LEAST_COMPUTE, Gpu, find_gpu, outdated, unpackaged
from nbl_export.targets.tensorrt.library import LIBRARIES, Library, load_library
from nbl_export.targets.tensorrt.record import RECORD_FILE, read_record
from nbl_export.targets.tensorrt.static.host import CheckedRunner, StaticRunner

__all__ = ["TRT", "TRT_RTX", "TensorRtEngine"]

_CHECKED_CHUNK = 24  # tokens; small, so that verification crosses chunk borders


class TensorRtEngine(Builds):
    """Compiles and runs with one of the two libraries."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.capabilities = library.capabilities

    def probe(self, *, run: bool = False) -> Availability:
        """Whether this machine can build an engine: builds one that adds two numbers. Never raises."""
        if run:
            return self._probe_run()
        library = self.library
        try:
            trt = load_library(library)
            where = "without a GPU"
            if not library.jit:
                gpu = _usable_gpu(library, trt.__version__)
                where = f"for the {gpu.name}"
            _build_known_answer(trt)
            runs = self._probe_run()
            reason = runs.reason if runs.available else f"engines do not run here: {runs.reason}"
            return Availability(True, f"{library.package} {trt.__version__} builds {where}; {reason}")
        except NblError as error:
            return Availability(False, f"{error}{self._advice()}")
        except Exception as error:  # a broken installation may raise anything
            text = " ".join(str(error).split())[:300]
            return Availability(False, f"{library.package} is installed and does not build: {text}{self._advice()}")

    def _probe_run(self) -> Availability:
        """Whether this machine can run an engine: library, GPU and driver fit, and a stream is made. Never raises."""
        from nbl_export.targets.tensorrt.device import check_device

        library = self.library
        try:
            trt = load_library(library)
            gpu = _usable_gpu(library, trt.__version__)
            check_device(gpu)
            return Availability(True, f"{library.package} {trt.__version__} runs on the {gpu.name} ({gpu.compute})")
        except NblError as error:
            return Availability(False, str(error))
        except Exception as error:
            return Availability(False, " ".join(str(error).split())[:300])

    def library_version(self) -> str:
        """Version of the installed package, without loading it; "" if there is none."""
        for suffix in ("", *(f"-cu{major}" for major in CUDA)):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(f"{self.library.package}{suffix}")
        return ""

    def build(self, source: Path, out: Path, settings: BuildSettings) -> dict[str, Any]:
        """See `build.build_engine`."""
        from nbl_export.targets.tensorrt.build import build_engine

        return build_engine(self.library, source, out, settings).to_json()

    def _advice(self) -> str:
        if self.library.jit:
            return ""
        return (
            f"; --engine {self.library.other} builds without a GPU, and nbl-export build DIR --engine "
            f"{self.capabilities.name} then compiles its graphs on the machine with the GPU"
        )

    def owns(self, path: Path) -> bool:
        """Whether the directory holds an engine that this library compiled."""
        return (path / RECORD_FILE).is_file() and read_record(path).engine == self.capabilities.name

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from engine.json."""
        record = read_record(path)
        vocab = next(o.shape[-1] for o in record.outputs if o.name == "logits")
        head = next(i.shape[-1] for i in record.inputs if i.name.startswith("past_key_values."))
        return DecoderFacts(int(vocab), record.max_seq_len, int(head), record.cache_bytes_per_token)

    def export(self, checkpoint: Path, out: Path, settings: ExportSettings) -> None:
        """With mobius, brought to the static form."""
        from nbl_export.targets.tensorrt.export import build

        check_bounds(checkpoint)
        build(checkpoint, out, settings.precision, max_seq_len=settings.cache_length)

    def write_float32(self, directory: Path, out: Path) -> None:
        """As `export.write_float32`."""
        from nbl_export.targets.tensorrt import export

        export.write_float32(directory, out)

    def open_runner(self, path: Path, threads: int | None = None) -> StaticRunner:
        """A text runner on a directory with a plan and engine.json; `threads` has no effect."""
        from nbl_export.targets.tensorrt.runner import open_session

        return StaticRunner(open_session(self.library, path), path)

    def open_graph(
        self,
        directory: Path,
        head_dim: int,
        file: str | None = None,
        threads: int | None = None,
        *,
        exact: bool = False,
    ) -> OnnxDecoder:
        """A float32 copy on ONNX Runtime's CPU provider, which has no MatMul for bf16.

        Never rounds activations: by default ONNX Runtime fuses int4 blocks to MatMulNBits with int8 activations
        (logits off by up to 1).
        """
        file = file or all_logits_file(directory)
        chunk = _checked_chunk(directory / file)
        return OnnxDecoder(directory, head_dim, threads, file=file, fp32_activations=True, chunk=chunk)

    def open_checked(self, directory: Path, threads: int | None = None) -> CheckedRunner:
        """A text runner on the same copy, with the logits that the deployed graph gives."""
        return CheckedRunner(self.open_graph(directory, 0, GRAPH_FILE, threads), directory)


def _checked_chunk(path: Path) -> int | None:
    """Tokens of a step; None for steps as long as they are asked for, since an exit layer depends on the borders of
    steps."""
    from nbl_export.graph.files import load_graph  # a build machine lacks onnx_ir

    return None if any(node.name == EXIT_ROWS for node in load_graph(path).graph) else _CHECKED_CHUNK


TRT = TensorRtEngine(LIBRARIES["trt"])


TRT_RTX = TensorRtEngine(LIBRARIES["trt-rtx"])


def _usable_gpu(library: Library, version: str) -> Gpu:
    """The GPU, if driver and library, of the installed version, support it.

    Raises:
        NblError: there is no GPU, the library has no kernels for it, or its driver is too old for the library.
    """
    gpu = find_gpu()
    title = library.capabilities.title
    if isinstance(gpu, str):
        raise NblError(gpu)
    if not library.runs_on(gpu.compute):
        known = ", ".join(library.computes) or f"{LEAST_COMPUTE} and later"
        raise NblError(
            f"{title} does not run on the {gpu.name}: its compute capability is {gpu.compute}, {title} is for {known}; "
            f"use --engine {library.other}"
        )
    if unfit := library.refuses(version, gpu):
        raise NblError(unfit)
    needed = _cuda_major(library)
    other = unpackaged(gpu) or f"in a new environment, {library.how_to_get(gpu)}"
    if needed is not None and (old := outdated(gpu, f"the installed {library.package}", needed, other)):
        raise NblError(old)
    return gpu


def _cuda_major(library: Library) -> int | None:
    """CUDA major version of the installed wheels: the distribution is called package-cuN."""
    for major in sorted(CUDA, reverse=True):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{library.package}-cu{major}")
            return major
    return None


@functools.cache
def _build_known_answer(trt: Any) -> None:
    """Build y = x + x. Raises NblError if the library gives no plan."""
    from nbl_export.targets.tensorrt.messages import messages_of, require

    log = messages_of(trt)
    with log.explaining(f"{trt.__name__} {trt.__version__} builds nothing"):
        builder = trt.Builder(log.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        x = network.add_input("x", trt.float16, (1, 2))
        total = network.add_elementwise(x, x, trt.ElementWiseOperation.SUM).get_output(0)
        network.mark_output(total)
        require(builder.build_serialized_network(network, builder.create_builder_config()))
