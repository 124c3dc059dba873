"""The instruments of a timed run: a clock, the energy, the wait for idle threads, and the load of other processes.

Wait: an engine's threads spin for a while after their work is done; ONNX Runtime's spin for about 45 ms (two threads of
an AMD EPYC). A run timed during that period shares its cores with these threads: a prefill of 512 tokens took a tenth
longer (docs/experiments.md). The wait is not for other processes.

Background: cores of this process ─► busy seconds of all processes - seconds of this process = others;  stolen by the
host. Paired rounds cancel only part of this effect. So the figures are recorded with every load, and the report
mentions large ones.

Energy: counters of processor packages, and of the only NVIDIA GPU of the machine.

    /sys/class/powercap/intel-rapl:N/energy_uj   microjoules of package N, wraps at max_energy_range_uj (AMD too)
    NVML (libnvidia-ml, which nvidia-smi asks)   nvmlDeviceGetTotalEnergyConsumption, millijoules

The counters are of the whole machine and include other programs. Most systems let only root read the first counter
(since CVE-2020-8694). If no counter can be read, there is no meter, and energy is not reported.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = [
    "Instruments",
    "Meter",
    "Reading",
    "background_of",
    "find_meter",
    "is_busy",
    "read_usage",
    "spoken_background",
    "used_between",
    "wait_until_idle",
]

_LOOK = 0.01  # seconds of one observation
_SHARE = 0.2  # share of one core that an idle process may use
_LIMIT = 1.0  # longest wait in seconds
# Share of the cores. If other processes take a tenth of the cores, a run that uses all cores can take a tenth longer:
# as much as the width of the interval at which rounds stop (`rounds.NARROW`).
_BUSY_SHARE = 0.1
# `user` includes guests on Linux, and `system` includes interrupts on Windows: do not add these again.
_WORK = ("user", "nice", "system", "irq", "softirq")
_POWERCAP = Path("/sys/class/powercap")
_NVML = ("nvml.dll",) if sys.platform == "win32" else ("libnvidia-ml.so.1", "libnvidia-ml.so")


def wait_until_idle(
    cpu: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep, limit: float = _LIMIT
) -> bool:
    """Return True when all threads together use less than a fifth of one core, or False after `limit` seconds.

    Args:
        cpu: returns the processor seconds of the process, all threads together.
    """
    for _ in range(round(limit / _LOOK)):
        before = cpu()
        sleep(_LOOK)
        if cpu() - before < _SHARE * _LOOK:
            return True
    return False


# -- other processes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Seconds since a fixed moment: wall clock, and processor time of all processes, of this one, and of the host."""

    clock: float
    busy: float
    own: float
    stolen: float


def read_usage() -> Reading:
    """Counters of the cores that this process may run on."""
    cores = psutil.cpu_times(percpu=True)
    chosen = [cores[i] for i in _own_cores() if i < len(cores)]
    busy = sum(getattr(core, name, 0.0) for core in chosen for name in _WORK)
    stolen = sum(getattr(core, "steal", 0.0) for core in chosen)
    return Reading(time.perf_counter(), busy, time.process_time(), stolen)


def _own_cores() -> Sequence[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def used_between(before: Reading, after: Reading) -> dict[str, float | None]:
    """Seconds, and mean cores used by other processes ("others") and by the host ("stolen") during them.

    "others" and "stolen" are None if the system does not count processor time. This process then seems to use more
    than all processes together.
    """
    seconds, busy = after.clock - before.clock, after.busy - before.busy
    own = after.own - before.own
    if seconds <= 0 or busy <= 0 or busy < own / 2:
        return {"seconds": seconds, "others": None, "stolen": None}
    return {
        "seconds": seconds,
        "others": max(0.0, busy - own) / seconds,
        "stolen": (after.stolen - before.stolen) / seconds,
    }


def background_of(loads: Sequence[Mapping[str, Any]], waits: int, gave_up: int) -> dict[str, Any]:
    """The value for bench.json.

    Args:
        loads: `used_between` of every load.
        waits: number of runs that waited until the threads of this process were idle.
        gave_up: number of these runs that started before the threads were idle.
    """
    known = [load for load in loads if load["others"] is not None]
    seconds = sum(load["seconds"] for load in known)
    means = {
        name: sum(load["seconds"] * load[name] for load in known) / seconds if known else None
        for name in ("others", "stolen")
    }
    found = {"cores": len(_own_cores()), **means, "waits": waits, "gave_up": gave_up}
    return {**found, "busy": is_busy(found), "loads": list(loads)}


def is_busy(found: Mapping[str, Any]) -> bool:
    """Whether other processes and the host took more than a tenth of the cores."""
    return found["others"] is not None and found["others"] + found["stolen"] > _BUSY_SHARE * found["cores"]


def spoken_background(found: Mapping[str, Any]) -> str:
    """The value of `background_of` in words that continue "speed was", without a full stop."""
    if found["others"] is None:
        words = "measured on a machine that does not count the processor time of other processes"
    else:
        where = "on a busy machine:" if is_busy(found) else "while"
        cores = f"{found['cores']} core{'' if found['cores'] == 1 else 's'}"
        stolen = f", and its host took {_cores(found['stolen'])} more" if found["stolen"] >= 0.01 else ""
        words = f"measured {where} other processes used {_cores(found['others'])} of {cores}{stolen}"
    if found["gave_up"]:
        words += f"; {found['gave_up']} of {found['waits']} runs began while threads of the previous run still computed"
    return words


def _cores(count: float) -> str:
    return f"{count:.2g}" if count < 10 else f"{count:.0f}"


# -- energy ------------------------------------------------------------------------------------------------------


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


# -- all of them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruments:
    """The instruments of a timed run.

    clock: monotonic nanoseconds. meter: energy, read before and after each timed run; None records no energy. idle:
    waits until no thread of this process computes; False if a thread still computes. usage: processor time of the
    machine, read before and after each load.
    """

    clock: Callable[[], int] = time.perf_counter_ns
    meter: Meter | None = None
    idle: Callable[[], bool] = wait_until_idle
    usage: Callable[[], Reading] = read_usage
