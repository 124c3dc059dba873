"""Finds the NVIDIA GPU and driver of this machine through the driver's own library; needs no package.

libcuda.so.1 / nvcuda.dll   cuInit, cuDriverGetVersion, cuDeviceGetCount, ...        (CUDA driver API, C ABI)
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

__all__ = ["Gpu", "find_gpu"]

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1", "libcuda.so")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU.

    Attributes:
        compute: compute capability, for example "8.9".
        cuda: newest CUDA version that the driver supports, for example (13, 0).
    """

    name: str
    compute: str
    cuda: tuple[int, int]


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
        return (
            _describe(driver) if count else "the NVIDIA driver finds no GPU (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
        )
    except (AttributeError, OSError) as error:
        return f"the NVIDIA driver cannot be asked: {error}"


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _describe(driver: ctypes.CDLL) -> Gpu:
    version = _integer(driver, "cuDriverGetVersion")  # 1000 x major + 10 x minor
    device = _integer(driver, "cuDeviceGet", 0)
    name = ctypes.create_string_buffer(256)
    _call(driver, "cuDeviceGetName", name, len(name), device)
    major, minor = (_integer(driver, "cuDeviceGetAttribute", attribute, device) for attribute in (_MAJOR, _MINOR))
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", (version // 1000, version % 1000 // 10))


def _integer(driver: ctypes.CDLL, function: str, *arguments: int) -> int:
    """The int that a function writes to the address in its first argument."""
    value = ctypes.c_int()
    _call(driver, function, ctypes.byref(value), *arguments)
    return value.value


def _call(driver: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(driver, function)(*arguments)
    if status:
        raise OSError(f"{function} answers {status}")
