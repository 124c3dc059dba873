"""Driver, clocks and power limit of the first visible NVIDIA GPU, by NVML (which nvidia-smi asks).

NVML ignores CUDA_VISIBLE_DEVICES. So the driver names the PCI address of the GPU that computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from nbl_export.targets.gpu import bus_id

__all__ = ["read_clocks"]

# Bits of nvmlClocksThrottleReason*: why the clocks are lower than they could be. Idleness is no reason.
_SLOWED = {0x4: "power limit", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature (hardware)",
           0x80: "power brake"}  # fmt: skip


def read_clocks() -> dict[str, Any] | None:
    """Driver, clocks, power limit and what slows the first visible GPU at this moment; None if NVML does not say."""
    said: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        import pynvml as nvml

        with contextlib.suppress(nvml.NVMLError):
            nvml.nvmlInit()
            device = nvml.nvmlDeviceGetHandleByPciBusId(bus_id())
            asked: dict[str, Callable[[], Any]] = {
                "driver": nvml.nvmlSystemGetDriverVersion,
                "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
                "memory_mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_MEM),
                "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000,
                "slowed_by": lambda: _reasons(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
            }
            for name, ask in asked.items():
                with contextlib.suppress(nvml.NVMLError):
                    said[name] = ask()
    return said or None


def _reasons(bits: int) -> list[str]:
    return [why for bit, why in _SLOWED.items() if bits & bit]
