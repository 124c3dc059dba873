"""Loads GenAI's CUDA library with pip's CUDA libraries, and makes a stream on the GPU.

    nvidia-cublas, nvidia-cufft, nvidia-curand, nvidia-cuda-runtime      (nvidia/cu13/lib in site-packages)
          └── onnxruntime.preload_dlls() ──► libonnxruntime-genai-cuda.so ──► a stream of libcudart

GenAI opens its CUDA library for both providers when it opens a model. The library of onnxruntime-genai-cuda 0.18 needs
libcublasLt.so.13, libcublas.so.13, libcurand.so.10, libcufft.so.12 and libcudart.so.13, without an RPATH
(`readelf -d`). `import onnxruntime_genai` loads only libonnxruntime. So GenAI answers "Cuda interface not available:
Failed to load library: libcublasLt.so.13: cannot open shared object file" (onnxruntime-genai, issue 2087), unless these
libraries are loaded: a library that is loaded serves whatever needs its name afterwards (dlopen(3)). Both were seen on
a machine without a GPU, where a stream is refused with cudaErrorInsufficientDriver.

The probe runs no session of plain ONNX Runtime: Python's onnxruntime and GenAI's libonnxruntime are two copies, and
both would share one provider library. Nor does it open that library itself, which reads a null pointer until ONNX
Runtime has set its host (core/providers/shared_library/provider_bridge_provider.cc).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import sys
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.targets.gpu import Gpu, outdated, unpackaged
from nbl_export.targets.onnx.genai import load_package

__all__ = ["OLDER_DRIVER", "check_cuda", "load_cuda"]

_GENAI_CUDA = "onnxruntime-genai-cuda.dll" if sys.platform == "win32" else "libonnxruntime-genai-cuda.so"
OLDER_DRIVER = "use --engine trt, which has packages for older drivers"
_GET_IT = "pip install 'onnxruntime-gpu[cuda,cudnn]' onnxruntime-genai-cuda"


@functools.cache
def load_cuda() -> int:
    """Load pip's CUDA libraries and GenAI's CUDA library; returns their CUDA major version.

    Raises:
        MissingPackageError: onnxruntime or onnxruntime-genai is not installed.
        NblError: a library is missing or does not load; the message names the library.
    """
    onnxruntime, genai = load_package("onnxruntime"), load_package("onnxruntime_genai")
    said = io.StringIO()  # `preload_dlls` prints what it does not find
    with contextlib.redirect_stdout(said):
        onnxruntime.preload_dlls()
    library = Path(str(genai.__file__)).parent / _GENAI_CUDA
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        found = " ".join(f"{error}. {said.getvalue()}".split())[:300]
        raise NblError(f"GenAI's CUDA library does not load: {found}; {_GET_IT}") from error
    return int(str(onnxruntime.cuda_version).split(".")[0])


def check_cuda(gpu: Gpu) -> None:
    """Load the libraries, and make and destroy a stream with them: only a first call shows a driver that is too old.

    Raises:
        NblError: a library does not load, the driver is too old for them, or the GPU refuses the stream.
    """
    major = load_cuda()
    if old := outdated(gpu, "the installed onnxruntime-gpu", major, unpackaged(gpu) or OLDER_DRIVER):
        raise NblError(old)
    name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
    try:
        runtime = ctypes.CDLL(name)
    except OSError as error:
        raise NblError(f"the CUDA runtime does not load: {error}; {_GET_IT}") from error
    stream = ctypes.c_void_p()
    _call(runtime, "cudaStreamCreate", ctypes.byref(stream))
    _call(runtime, "cudaStreamDestroy", stream)


def _call(runtime: Any, function: str, argument: Any) -> None:
    status = getattr(runtime, function)(argument)
    if status:
        named = runtime.cudaGetErrorName
        named.restype = ctypes.c_char_p
        raise NblError(f"the GPU refuses {function}: {named(status).decode(errors='replace')} (see nvidia-smi)")
