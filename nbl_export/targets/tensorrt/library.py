"""The two TensorRT libraries as data, loaded at first use."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nbl_export.errors import NblError
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.gpu import JETSON_TENSORRT, Gpu, find_gpu, has_kernels, is_jetson, release_for, unpackaged

__all__ = ["LIBRARIES", "Library", "load_library"]


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT for RTX.

    Attributes:
        module: name to import.
        package: name for pip, of the newest CUDA.
        origin: where the library comes from, if not from PyPI.
        jit: whether the library compiles kernels when an engine loads. If so, it builds without a GPU, a cache of
            kernels can be kept, and it captures CUDA graphs by itself.
        computes: compute capabilities of a plan; empty for that of the GPU at hand, `gpu.LEAST_COMPUTE` or later.
        other: the engine to try instead.
        jetson: the package for pip on a Jetson, if it is another.
    """

    capabilities: Capabilities
    module: str
    package: str
    origin: str
    jit: bool
    computes: tuple[str, ...]
    other: str
    jetson: str = ""

    def how_to_get(self, gpu: Gpu | str) -> str:
        """The command that installs the library and the bindings for a GPU and its driver."""
        release = release_for(gpu)
        package = self.jetson if self.jetson and is_jetson(gpu) else f"{self.package}{release.suffix}"
        return f"pip install {package} {release.bindings}{self.origin}"

    def refuses(self, version: str, gpu: Gpu) -> str:
        """Why an installed version is not for a GPU, without a full stop; "" if it is."""
        number = tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
        if not self.jetson or not is_jetson(gpu) or not (11,) <= number < (11, 4, 1):
            return ""
        return (
            f"{self.package} {version} is not for the {gpu.name}, a Jetson: {self.how_to_get(gpu)}, or use "
            "TensorRT 11.4.1 of JetPack 7.2.2"
        )

    def runs_on(self, compute: str) -> bool:
        """Whether the library has kernels for a compute capability."""
        return has_kernels(compute, self.computes)


_SYSTEM = Path("/usr/lib")  # JetPack and Debian packages put Python modules below it, where no environment looks
# bf16 first: it does not overflow, and fused attention in fp16 sums in fp16 (see `static_form.numbers`)
_PRECISIONS = ("bf16", "fp16", "int4")
_SOURCES = {"static": ("fp32", *_PRECISIONS)}


_COMPILED: dict[str, Any] = {
    "static": True, "verified_by": "ort", "needs_target_gpu": True, "kinds": None,
    "cache_bytes": dict.fromkeys(_PRECISIONS, 2),
}  # fmt: skip


LIBRARIES = {
    "trt": Library(
        capabilities=Capabilities("trt", "TensorRT", _PRECISIONS, _SOURCES, **_COMPILED),
        module="tensorrt",
        package="tensorrt",
        origin=" (its libraries come from NVIDIA's own package index)",
        jit=False,
        computes=(),
        other="trt-rtx",
        jetson=JETSON_TENSORRT,
    ),
    "trt-rtx": Library(
        capabilities=Capabilities("trt-rtx", "TensorRT for RTX", _PRECISIONS, _SOURCES, **_COMPILED),
        module="tensorrt_rtx",
        package="tensorrt-rtx",
        origin="",
        jit=True,
        computes=("8.0", "8.6", "8.9", "12.0", "12.1"),
        other="trt",
    ),
}


def load_library(library: Library) -> ModuleType:
    """Import the library's module.

    Raises:
        NblError: the package is not installed, or does not load; the message says how to get it.
    """
    if importlib.util.find_spec(library.module) is None:
        raise NblError(f"the package {library.package} is not installed: {_advice(library)}")
    try:
        return importlib.import_module(library.module)
    except Exception as error:  # a package without its libraries raises FileNotFoundError, OSError, ImportError
        raise NblError(f"the package {library.package} does not load ({error}): {_advice(library)}") from error


def _advice(library: Library) -> str:
    """How to install a library that fits the driver of this machine."""
    gpu = find_gpu()
    found = sorted(_SYSTEM.glob(f"python3*/dist-packages/{library.module}"))
    first = f"make the environment with --system-site-packages to see that in {found[0].parent}, or " if found else ""
    return first + (unpackaged(gpu) or library.how_to_get(gpu))
