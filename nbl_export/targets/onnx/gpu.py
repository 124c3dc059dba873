"""ONNX Runtime GenAI on an NVIDIA GPU: directories for the CUDA provider, which onnxruntime-gpu runs.

The GenAI builder makes fp16 GroupQueryAttention, and MatMulNBits for int8 and int4.

Observations of onnxruntime-genai 0.18 with onnxruntime 1.31, on machines without a GPU:

- The builder makes graphs for the provider without a GPU, and ONNX Runtime's CPU provider computes them at fp16,
  int8 and int4. So any machine can verify a directory that another machine runs. There are no CPU kernels for bf16.
  At fp32 the builder's graph for CUDA is not valid ("Graph output (present.0.key) does not exist").
- TensorRT's own provider is not available: GenAI passes unknown names to ONNX Runtime, which answers "Unknown provider
  name 'tensorrt'", also for TensorRT and TensorrtExecutionProvider. TensorRT's parser would not take
  GroupQueryAttention either.

GenAI opens its CUDA library when it opens a model. The library of onnxruntime-genai-cuda 0.18 needs libcublasLt.so.13,
libcublas.so.13, libcurand.so.10, libcufft.so.12 and libcudart.so.13, without an RPATH (`readelf -d`):

    nvidia-cublas, nvidia-cufft, nvidia-curand, nvidia-cuda-runtime      (nvidia/cu13/lib in site-packages)
          └── onnxruntime.preload_dlls() ──► libonnxruntime-genai-cuda.so

`import onnxruntime_genai` loads only libonnxruntime. So GenAI answers "Cuda interface not available: Failed to load
library: libcublasLt.so.13: cannot open shared object file" (onnxruntime-genai, issue 2087), unless these libraries are
loaded: a library that is loaded serves whatever needs its name afterwards (dlopen(3)).

The probe runs no session of plain ONNX Runtime: Python's onnxruntime and GenAI's libonnxruntime are two copies, and
both would share one provider library. Nor does it open that library itself, which reads a null pointer until ONNX
Runtime has set its host (core/providers/shared_library/provider_bridge_provider.cc).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import io
import sys
from pathlib import Path

from nbl_export.errors import NblError, install
from nbl_export.targets.base import Availability
from nbl_export.targets.gpu import LEAST_COMPUTE, Gpu, find_gpu, has_kernels, outdated, unpackaged
from nbl_export.targets.onnx import engine as ort
from nbl_export.targets.onnx.export_genai import CUDA_PRECISIONS
from nbl_export.targets.onnx.facts import CUDA
from nbl_export.targets.onnx.genai import GenaiRunner, load_package

__all__ = ["ORT_CUDA", "PACKAGES", "load_cuda"]

PACKAGES = ("onnxruntime-gpu", "onnxruntime-genai-cuda")
_CUDA_MAJOR = 13  # of these packages
_GENAI_CUDA = "onnxruntime-genai-cuda.dll" if sys.platform == "win32" else "libonnxruntime-genai-cuda.so"
_OLDER_DRIVER = "use --engine trt, which has packages for older drivers"


class CudaEngine(ort.OrtEngine):
    """The engine "ort" with the CUDA provider: exports and verifies anywhere, runs where GPU and packages are."""

    capabilities = dataclasses.replace(
        ort.CAPABILITIES,
        title="ONNX Runtime, CUDA provider",
        precisions=CUDA_PRECISIONS,
        sources={"genai": CUDA_PRECISIONS},
        cache_bytes=dict.fromkeys(CUDA_PRECISIONS, 2),
        needs_target_gpu=True,
        provider=CUDA,
        faster_on_cpu="",
        balanced=(),
    )

    def probe(self, *, run: bool = False) -> Availability:
        """Whether directories are made here; or run: GPU, driver and packages fit, and load. Never raises."""
        if not run:
            return super().probe()
        gpu = find_gpu()
        if isinstance(gpu, str):
            return Availability(False, _missing_packages() or gpu)
        if reason := _unfit(gpu) or _missing_packages():
            return Availability(False, reason)
        try:
            load_cuda()
        except Exception as error:  # a broken installation may raise anything
            return Availability(False, " ".join(str(error).split())[:500])
        return Availability(True, f"CUDA provider on the {gpu.name} ({gpu.compute})")

    def open_runner(self, path: Path, threads: int | None = None) -> GenaiRunner:
        """A text runner on the directory's provider."""
        load_cuda()
        return GenaiRunner(path, threads or 1)

    def open_checked(self, directory: Path, threads: int | None = None) -> GenaiRunner:
        """The same directory on the CPU provider, for verification."""
        return GenaiRunner(directory, threads, on_cpu=True)


ORT_CUDA = CudaEngine()


def _missing_packages() -> str:
    missing = [name for name in PACKAGES if not ort.is_installed(name)]
    if not missing:
        return ""
    clash = [name for name in ("onnxruntime", "onnxruntime-genai") if ort.is_installed(name)]
    first = f"pip uninstall {' '.join(clash)}, then " if clash else ""
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed: {first}{install('gpu')}"


def _unfit(gpu: Gpu) -> str:
    if not has_kernels(gpu.compute):
        return (
            f"the CUDA provider does not run on the {gpu.name}: its compute capability is {gpu.compute}, the provider "
            f"is for {LEAST_COMPUTE} and later"
        )
    return outdated(gpu, PACKAGES[0], _CUDA_MAJOR, unpackaged(gpu) or _OLDER_DRIVER)


@functools.cache
def load_cuda() -> None:
    """Load pip's CUDA libraries and GenAI's CUDA library.

    Raises:
        MissingPackageError: onnxruntime or onnxruntime-genai is not installed.
        NblError: a library is missing or does not load; the message names the library.
    """
    onnxruntime = load_package("onnxruntime")
    genai = load_package("onnxruntime_genai")
    said = io.StringIO()  # `preload_dlls` prints what it does not find
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    library = Path(str(genai.__file__)).parent / _GENAI_CUDA
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        found = " ".join(f"{error}. {said.getvalue()}".split())[:300]
        advice = "pip install 'onnxruntime-gpu[cuda,cudnn]' onnxruntime-genai-cuda"
        raise NblError(f"GenAI's CUDA library does not load: {found}; {advice}") from error
