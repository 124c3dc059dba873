"""Finds the NVIDIA GPU and driver of this machine through the driver's own library; needs no package.

libcuda.so.1 / nvcuda.dll   cuInit, cuDriverGetVersion, cuDeviceGetCount, ...        (CUDA driver API, C ABI)

    driver   newest CUDA   packages for pip
    R580     13            tensorrt, tensorrt-rtx, cuda-python; onnxruntime-gpu and onnxruntime-genai-cuda of today
    R535     12            tensorrt-cu12, tensorrt-rtx-cu12, cuda-python<13

A driver also runs packages of an older CUDA. Sources: TensorRT 11.4, "Prerequisites" (R580 for CUDA 13, R535 for the
wheels of CUDA 12); cuda-bindings, "Installation" (13 needs driver 580.65.06, 12.9 needs 525.60.13) and the release
notes of 13.0.3 (the bindings link the runtime of CUDA 13 statically, so they bring this requirement).
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

__all__ = ["CUDA", "CudaRelease", "Gpu", "find_gpu", "outdated", "release_for", "spoken"]

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        compute: compute capability, for example "8.9".
        cuda: newest CUDA version that the driver supports, for example (13, 0).
        count: visible GPUs; the other fields describe the first.
    """

    name: str
    compute: str
    cuda: tuple[int, int]
    count: int = 1


@dataclass(frozen=True)
class CudaRelease:
    """What a major version of CUDA needs.

    Attributes:
        driver: oldest branch of the driver.
        suffix: ends the names of NVIDIA's packages; "" for the packages without a suffix.
        bindings: the Python bindings, as an argument of pip.
    """

    driver: str
    suffix: str
    bindings: str


CUDA = {13: CudaRelease("R580", "", "cuda-python"), 12: CudaRelease("R535", "-cu12", "'cuda-python<13'")}


def find_gpu() -> Gpu | str:
    """The first visible GPU, or the reason why there is none, without a full stop. Never raises."""
    driver = _load()
    if driver is None:
        return "no NVIDIA driver is installed (libcuda is not found)"
    try:
        status = driver.cuInit(0)
        if status == _NO_DEVICE:
            return "the NVIDIA driver finds no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        if status:
            return f"the NVIDIA driver does not start: cuInit answers {status} (see nvidia-smi)"
        count = _integer(driver, "cuDeviceGetCount")
        if not count:
            return "the NVIDIA driver finds no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        return _describe(driver, count)
    except (AttributeError, OSError) as error:
        return f"the NVIDIA driver cannot be asked: {error}"


def release_for(gpu: Gpu | str) -> CudaRelease:
    """The newest CUDA whose packages the driver runs; the newest of all if there is no GPU or no such CUDA."""
    fitting = [major for major in CUDA if isinstance(gpu, str) or major <= gpu.cuda[0]]
    return CUDA[max(fitting or CUDA)]


def outdated(gpu: Gpu, package: str, major: int, instead: str) -> str:
    """Say that a package needs a newer driver, without a full stop; "" if the driver is new enough.

    Args:
        major: CUDA major version of the package.
        instead: what to do if the driver stays and supports a CUDA of `CUDA`.
    """
    if gpu.cuda[0] >= major:
        return ""
    newer = f"{CUDA[major].driver} or later" if major in CUDA else f"one for CUDA {major}"
    other = f", or {instead}" if gpu.cuda[0] in CUDA else ""
    return (
        f"the NVIDIA driver supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, {package} needs CUDA {major}: "
        f"update the driver to {newer}{other}"
    )


def spoken(gpu: Gpu | str) -> str:
    """GPU and driver as one line, with the packages that fit the driver."""
    if isinstance(gpu, str):
        return f"GPU: {gpu}"
    release = release_for(gpu)
    packages = [f"tensorrt{release.suffix}", f"tensorrt-rtx{release.suffix}", release.bindings]
    others = f"; {gpu.count} GPUs are visible, and engines use the first" if gpu.count > 1 else ""
    return (
        f"GPU: {gpu.name}, compute capability {gpu.compute}; the driver supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}, "
        f"for which there are {', '.join(packages)}{others}"
    )


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _describe(driver: ctypes.CDLL, count: int) -> Gpu:
    version = _integer(driver, "cuDriverGetVersion")  # 1000 x major + 10 x minor
    device = _integer(driver, "cuDeviceGet", 0)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    major, minor = (_integer(driver, "cuDeviceGetAttribute", attribute, device) for attribute in (_MAJOR, _MINOR))
    cuda = (version // 1000, version % 1000 // 10)
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", cuda, count)


def _integer(driver: ctypes.CDLL, function: str, *arguments: int) -> int:
    """The int that a function writes to the address in its first argument."""
    value = ctypes.c_int()
    _call(driver, function, ctypes.byref(value), *arguments)
    return value.value


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(driver, function)(*arguments)
    if status:
        raise OSError(f"{function} answers {status}")
