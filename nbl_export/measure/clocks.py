"""Driver, clocks and power limit of the first visible NVIDIA GPU, by NVML (libnvidia-ml, which nvidia-smi asks).

NVML ignores CUDA_VISIBLE_DEVICES. So the driver names the PCI address of the GPU that computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

from nbl_export.targets.gpu import bus_id

__all__ = ["read_clocks"]

_NVML = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1", "libnvidia-ml.so")
_CLOCKS = {"sm_mhz": 1, "memory_mhz": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM
# Bits of nvmlClocksThrottleReason*: why the clocks are lower than they could be. Idleness is no reason.
_SLOWED = {0x4: "power limit", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature (hardware)",
           0x80: "power brake"}  # fmt: skip


def read_clocks() -> dict[str, Any] | None:
    """Driver, clocks, power limit and what slows the first visible GPU at this moment; None if NVML does not say."""
    if (found := _nvml()) is None:
        return None
    library, device = found
    driver = ctypes.create_string_buffer(96)
    number = ctypes.c_uint()
    reasons = ctypes.c_ulonglong()
    said: dict[str, Any] = {}
    with contextlib.suppress(AttributeError):
        if not library.nvmlSystemGetDriverVersion(driver, len(driver)):
            said["driver"] = driver.value.decode(errors="replace")
        for name, kind in _CLOCKS.items():
            if not library.nvmlDeviceGetClockInfo(device, kind, ctypes.byref(number)):
                said[name] = number.value
        if not library.nvmlDeviceGetEnforcedPowerLimit(device, ctypes.byref(number)):
            said["power_limit_watts"] = number.value / 1000
        if not library.nvmlDeviceGetCurrentClocksThrottleReasons(device, ctypes.byref(reasons)):
            said["slowed_by"] = [why for bit, why in _SLOWED.items() if reasons.value & bit]
    return said or None


def _nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML and the first visible GPU; None if the driver or NVML does not name it."""
    address = bus_id().encode()
    for name in _NVML:
        try:
            library = ctypes.CDLL(name)
            device = ctypes.c_void_p()
            if not address or library.nvmlInit_v2():
                return None
            if library.nvmlDeviceGetHandleByPciBusId_v2(address, ctypes.byref(device)):
                return None
        except (OSError, AttributeError):
            continue
        return library, device
    return None
