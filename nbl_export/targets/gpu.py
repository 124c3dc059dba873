"""Finds the NVIDIA GPU and driver of this machine through the driver's own library; needs no package.

libcuda.so.1 / nvcuda.dll   cuInit, cuDriverGetVersion, cuDeviceGetCount, ...        (CUDA driver API, C ABI)

    driver   newest CUDA   packages for pip
    R580     13            tensorrt, tensorrt-rtx, cuda-python; onnxruntime-gpu and onnxruntime-genai-cuda of today
    R535     12            tensorrt-cu12, tensorrt-rtx-cu12, cuda-python<13

TensorRT's wheels for aarch64 (10.15, 10.16 and 11.4 were looked up) are for CUDA 13 alone. JetPack 6 of a Jetson has
CUDA 12.6 and TensorRT 10.3, and the cache operator of our graphs needs 10.15. TensorRT 11.0 to 11.4.0 are not for
Orin and Thor (TensorRT 11.4.1, "Migrating TensorRT from 10.x to 11.x on Jetson").

A driver also runs packages of an older CUDA. Sources: TensorRT 11.4, "Prerequisites" (R580 for CUDA 13, R535 for the
wheels of CUDA 12); cuda-bindings, "Installation" (13 needs driver 580.65.06, 12.9 needs 525.60.13) and the release
notes of 13.0.3 (the bindings link the runtime of CUDA 13 statically, so they bring this requirement).
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CUDA",
    "JETSON_TENSORRT",
    "LEAST_COMPUTE",
    "CudaRelease",
    "Gpu",
    "bus_id",
    "describe",
    "describe_gpu",
    "find_gpu",
    "free_bytes",
    "has_kernels",
    "is_jetson",
    "outdated",
    "release_for",
    "unpackaged",
]

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_MINOR = 76
_MEMORY_KHZ = 36  # CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, _GLOBAL_MEMORY_BUS_WIDTH
_BUS_BITS = 37
LEAST_COMPUTE = "7.5"  # CUDA 13 has no kernels below
JETSON_TENSORRT = "'tensorrt>=10.16,<11'"  # for pip
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


def is_jetson(gpu: Gpu | str) -> bool:
    """Whether the GPU is that of a Jetson, Orin or Thor."""
    return isinstance(gpu, Gpu) and platform.machine() == "aarch64" and gpu.compute in ("8.7", "11.0")


def unpackaged(gpu: Gpu | str) -> str:
    """What to do if there are no packages of TensorRT for the driver, without a full stop; "" if there are."""
    if isinstance(gpu, str) or gpu.cuda[0] >= max(CUDA) or platform.machine() != "aarch64":
        return ""
    return f"on a Jetson install JetPack 7.2, since TensorRT's wheels for aarch64 are for CUDA {max(CUDA)} alone"


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


def describe_gpu(gpu: Gpu | str) -> str:
    """GPU and driver as one line; the engines name the packages that fit them."""
    if isinstance(gpu, str):
        return f"GPU: {gpu}"
    began = f"GPU: {gpu.name}, compute capability {gpu.compute}; the driver supports CUDA {gpu.cuda[0]}.{gpu.cuda[1]}"
    others = f"{gpu.count} GPUs are visible, and engines use the first" if gpu.count > 1 else ""
    return "; ".join(part for part in (began, others) if part)


def describe() -> dict[str, Any] | None:
    """The first visible GPU as a record of results names it; None if there is none. Never raises.

    "memory_bytes_per_second" is the product of memory clock, bus width and two transfers a clock.
    """
    gpu = find_gpu()
    driver = _load()
    if isinstance(gpu, str) or driver is None:
        return None
    facts: dict[str, Any] = {"name": gpu.name, "compute": gpu.compute, "cuda": "{}.{}".format(*gpu.cuda)}
    with contextlib.suppress(AttributeError, OSError):
        device = _integer(driver, "cuDeviceGet", 0)
        clock, bits = (_integer(driver, "cuDeviceGetAttribute", n, device) for n in (_MEMORY_KHZ, _BUS_BITS))
        facts["memory_bytes_per_second"] = 2 * clock * 1000 * bits // 8
        total = ctypes.c_size_t()
        _call(driver, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
        facts["memory_bytes"] = total.value
    return facts


def bus_id() -> str:
    """PCI address of the first visible GPU, by which NVML finds it; "" if the driver does not say. Never raises."""
    driver = None if isinstance(find_gpu(), str) else _load()
    address = ctypes.create_string_buffer(32)
    with contextlib.suppress(AttributeError, OSError):
        if driver is not None:
            _call(driver, "cuDeviceGetPCIBusId", address, len(address), _integer(driver, "cuDeviceGet", 0))
    return address.value.decode(errors="replace")


def free_bytes() -> int | None:
    """Free memory of the first visible GPU; None if the driver does not say. Never raises.

    The driver's context of this process is made first, and stays, so it is not counted between two calls.
    """
    driver = None if isinstance(find_gpu(), str) else _load()
    if driver is None:
        return None
    free = ctypes.c_size_t()
    total = ctypes.c_size_t()
    with contextlib.suppress(AttributeError, OSError), _context(driver):
        _call(driver, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value
    return None


@contextlib.contextmanager
def _context(driver: ctypes.CDLL) -> Iterator[None]:
    """Within: the primary context of the first GPU is this thread's."""
    context = ctypes.c_void_p()
    _call(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), _integer(driver, "cuDeviceGet", 0))
    _call(driver, "cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call(driver, "cuCtxPopCurrent_v2", ctypes.byref(context))


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


def has_kernels(compute: str, computes: Sequence[str] = ()) -> bool:
    """Whether a compute capability is one of `computes`, or at least `LEAST_COMPUTE` if `computes` is empty."""
    return compute in computes if computes else _version(compute) >= _version(LEAST_COMPUTE)


def _version(compute: str) -> tuple[int, ...]:
    return tuple(int(part) for part in compute.split("."))
