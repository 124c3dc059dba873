"""Energy from the machine's own counters: processor packages, and the only NVIDIA GPU of the machine.

    /sys/class/powercap/intel-rapl:N/energy_uj   microjoules of package N, wraps at max_energy_range_uj (AMD too)
    NVML (libnvidia-ml, which nvidia-smi asks)   nvmlDeviceGetTotalEnergyConsumption, millijoules

The counters are of the whole machine and include other programs. Most systems let only root read the first counter
(since CVE-2020-8694). If no counter can be read, there is no meter, and energy is not reported.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["Meter", "find_meter"]

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
    if gpu and (device := _nvml(libraries)) is not None:
        counters["GPU"] = (device, 0)
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


def _nvml(libraries: Sequence[str]) -> Callable[[], int] | None:
    """A reader of the GPU's counter; None without a driver, with several GPUs, or if the GPU has no counter."""
    for name in libraries:
        try:
            library = ctypes.CDLL(name)
            count, device = ctypes.c_uint(), ctypes.c_void_p()
            if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) or count.value != 1:
                return None
            if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
                return None
        except (OSError, AttributeError):
            continue
        return _counter(library, device)
    return None


def _counter(library: ctypes.CDLL, device: ctypes.c_void_p) -> Callable[[], int] | None:
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
