"""Counters of energy: of processor packages, and of the first visible NVIDIA GPU; the clocks of that GPU.

    /sys/class/powercap/intel-rapl:N/energy_uj   microjoules of package N, wraps at max_energy_range_uj (AMD too)
    NVML (libnvidia-ml, which nvidia-smi asks)   nvmlDeviceGetTotalEnergyConsumption, millijoules

NVML ignores CUDA_VISIBLE_DEVICES. So the driver names the PCI address of the GPU that computes.

The counters are of the whole machine and include other programs. Most systems let only root read the first counter
(since CVE-2020-8694). If no counter can be read, there is no meter, and energy is not reported.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbl_export.targets.gpu import bus_id

__all__ = ["Meter", "find_meter", "read_clocks"]

_POWERCAP = Path("/sys/class/powercap")
_NVML = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1", "libnvidia-ml.so")


class Meter:
    """Counters of energy, added up.

    Args:
        counters: name -> (read, wraps). read gives microjoules since a fixed moment. wraps is the value at which the
            counter restarts from 0, or 0 if it never does.
    """

    def __init__(self, counters: dict[str, tuple[Callable[[], int], int]]) -> None:
        self.sources = tuple(counters)
        self._counters = tuple(counters.values())
        self._last = [read() for read, _ in self._counters]
        self._total = 0

    def read(self) -> int:
        """Microjoules of all counters since the meter was made; corrects one wrap of a counter."""
        for index, (read, wraps) in enumerate(self._counters):
            now = read()
            passed = now - self._last[index]
            self._total += passed + wraps if passed < 0 else passed
            self._last[index] = now
        return self._total


def find_meter(*, gpu: bool, powercap: Path = _POWERCAP, libraries: Sequence[str] = _NVML) -> Meter | None:
    """A meter of the readable counters, or None. Never raises.

    Args:
        gpu: whether the work runs on a GPU; if not, the GPU's counter is not read.
    """
    counters = {}
    for zone in _packages(powercap):
        if (package := _rapl(zone)) is not None:
            counters[f"package {zone.name.rpartition(':')[2]}"] = package
    if gpu and (found := _nvml(libraries)) is not None and (counter := _counter(*found)) is not None:
        counters["GPU"] = (counter, 0)
    return Meter(counters) if counters else None


def _packages(powercap: Path) -> list[Path]:
    """Zones whose name is a package; core and dram are parts of a package, and psys contains packages."""
    try:
        zones = sorted(powercap.glob("intel-rapl:*"))
        return [z for z in zones if (z / "name").read_text().startswith("package")]
    except OSError:
        return []


def _rapl(zone: Path) -> tuple[Callable[[], int], int] | None:
    def read() -> int:
        return int((zone / "energy_uj").read_text())

    try:
        read()
        return read, int((zone / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return None


def _nvml(libraries: Sequence[str]) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML and the first visible GPU; None if the driver or NVML does not name it."""
    address = bus_id().encode()
    for name in libraries:
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


_CLOCKS = {"sm_mhz": 1, "memory_mhz": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM
# Bits of nvmlClocksThrottleReason*: why the clocks are lower than they could be. Idleness is no reason.
_SLOWED = {0x4: "power limit", 0x8: "hardware slowdown", 0x20: "temperature", 0x40: "temperature (hardware)",
           0x80: "power brake"}  # fmt: skip


def read_clocks(libraries: Sequence[str] = _NVML) -> dict[str, Any] | None:
    """Driver, clocks, power limit and what slows the first visible GPU at this moment; None if NVML does not say."""
    if (found := _nvml(libraries)) is None:
        return None
    library, device = found
    driver, number, reasons = ctypes.create_string_buffer(96), ctypes.c_uint(), ctypes.c_ulonglong()
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


def _counter(library: ctypes.CDLL, device: ctypes.c_void_p) -> Callable[[], int] | None:
    """A reader of the GPU's energy; None if the GPU has no counter."""

    def read() -> int:
        millijoules = ctypes.c_ulonglong()
        if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            raise OSError("the GPU reports no energy")
        return 1000 * millijoules.value

    try:
        read()
    except (OSError, AttributeError):
        return None
    return read
