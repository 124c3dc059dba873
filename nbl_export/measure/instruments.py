"""The instruments of a timed run: clock, energy, wait for idle threads, load of other processes, memory, load time.

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

Memory and load time are those of one decoder in a fresh process:

    load ─► prompt and a few tokens ─► resident memory ─► load twice more for the time
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from nbl_export.child import Child, Write
from nbl_export.errors import NblError
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE, IR_WEIGHTS
from nbl_export.targets.gpu import free_bytes
from nbl_export.targets.runners import TextRunner

__all__ = ["Footprint", "Instruments", "Meter", "OpenRunner", "Reading", "background_of", "disk_bytes",
           "find_meter", "footprint_here", "is_busy", "measure_footprint", "read_clocks", "read_usage",
           "used_between", "wait_until_idle"]  # fmt: skip

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
OpenRunner = Callable[..., TextRunner]  # of a directory and a number of threads
_LONGEST = 1000  # characters of an error from the child
_DECODED = 8  # tokens decoded before memory is read
_LOADS = 3  # load seconds are the median of this many loads,
_CHEAP_LOAD_SECONDS = 10.0  # unless the first load takes longer than this
# kind of file -> its names; any other file is "other"
_KINDS = {
    "engine": ("*.engine",),
    "kernels": ("*.cache",),  # of TensorRT-RTX, compiled on the GPU
    "weights": ("*.data", "*.safetensors", IR_WEIGHTS),
    "graph": ("*.onnx", IR_FILE, ALL_LOGITS_IR),
    "tokenizer": ("tokenizer*", "openvino_*tokenizer.*", "vocab*", "merges.txt", "special_tokens_map.json",
                  "added_tokens.json", "*.jinja"),
    "settings": ("*.json",),
}  # fmt: skip


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
    """NVML and the machine's only GPU; None without a driver or with several GPUs."""
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
        return library, device
    return None


_CLOCKS = {"sm_mhz": 1, "memory_mhz": 2}  # NVML_CLOCK_SM, NVML_CLOCK_MEM


def read_clocks(libraries: Sequence[str] = _NVML) -> dict[str, Any] | None:
    """Driver, clocks and power limit of the machine's only GPU at this moment; None if NVML does not say."""
    if (found := _nvml(libraries)) is None:
        return None
    library, device = found
    driver, number = ctypes.create_string_buffer(96), ctypes.c_uint()
    said: dict[str, Any] = {}
    with contextlib.suppress(AttributeError):
        if not library.nvmlSystemGetDriverVersion(driver, len(driver)):
            said["driver"] = driver.value.decode(errors="replace")
        for name, kind in _CLOCKS.items():
            if not library.nvmlDeviceGetClockInfo(device, kind, ctypes.byref(number)):
                said[name] = number.value
        if not library.nvmlDeviceGetEnforcedPowerLimit(device, ctypes.byref(number)):
            said["power_limit_watts"] = number.value / 1000
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


# -- memory, load time and size on disk ------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory and load seconds of one decoder alone in a process.

    peak: largest resident set of the process, with interpreter and engine library (about 35 MB before a model is
    loaded). File pages that the engine maps count while they are resident. steady: resident set with the model loaded
    and the sequence in its cache. load: opening the runner, with the files in the page cache. device: memory that the
    GPU has less of in the steady state, without the driver's context; None without a GPU.
    """

    peak_memory_bytes: int
    steady_memory_bytes: int
    load_seconds: float
    device_memory_bytes: int | None = None


def disk_bytes(directory: Path) -> dict[str, int]:
    """Bytes of the files of a deployable directory, by kind of file; kinds without files are omitted."""
    sizes = dict.fromkeys((*_KINDS, "other"), 0)
    for path in directory.rglob("*"):
        if path.is_file():
            kind = next((k for k, names in _KINDS.items() if any(path.match(name) for name in names)), "other")
            sizes[kind] += path.stat().st_size
    return {kind: size for kind, size in sizes.items() if size}


def measure_footprint(
    open_runner: OpenRunner, directory: Path, threads: int | None, prompt: Sequence[int], capacity: int,
    gpu: bool = False,
) -> Footprint:  # fmt: skip
    """Load a decoder alone in a fresh process, run one sequence, and read the memory of that process.

    The child process has ended on return, also after Ctrl-C.

    Args:
        capacity: tokens to reserve the cache for, as the timed runs do.
        gpu: whether the decoder runs on a GPU; only then is the GPU asked for its memory.

    Raises:
        NblError: the runner failed in the child, or a signal ended the child; the message says which.
    """
    with Child(_child, open_runner, directory, threads, list(prompt), capacity, gpu) as child:
        answer = child.answer()
        if answer is None:
            raise NblError(f"measuring {directory} failed: the process that loaded it {child.ending()}")
    if isinstance(answer, str):
        raise NblError(answer)
    peak, steady, seconds, device = answer
    return Footprint(int(peak), int(steady), float(seconds), device)


def _child(
    write: Write, open_runner: OpenRunner, directory: Path, threads: int | None, prompt: Sequence[int], capacity: int,
    gpu: bool,
) -> None:  # fmt: skip
    try:
        found = footprint_here(functools.partial(open_runner, directory, threads), prompt, capacity, gpu)
        write(dataclasses.astuple(found))
    except NblError as error:
        write(str(error))
    except MemoryError:
        write(f"measuring {directory} needs more memory: close other programs, or use a smaller precision")
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        write(f"measuring {directory} failed in the process that loaded it: {text[:_LONGEST]}")


def footprint_here(
    load: Callable[[], TextRunner], prompt: Sequence[int], capacity: int, gpu: bool = False
) -> Footprint:
    """The same in this process, whose memory so far counts too."""
    free = free_bytes() if gpu else None
    start = time.perf_counter()
    with load() as runner:
        seconds = [time.perf_counter() - start]
        runner.begin(capacity)
        runner.append(prompt)
        for token in prompt[: min(_DECODED, capacity - len(prompt))]:
            runner.append([token])
        steady = psutil.Process().memory_info().rss
        peak = max(_peak_memory_bytes(), steady)  # the kernel's two counters may differ by a page
        left = None if free is None else free_bytes()
    while len(seconds) < _LOADS and seconds[0] < _CHEAP_LOAD_SECONDS:
        start = time.perf_counter()
        with load():
            seconds.append(time.perf_counter() - start)
    device = None if free is None or left is None else max(0, free - left)
    return Footprint(peak, steady, statistics.median(seconds), device)


def _peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux reports the value as VmHWM. Linux's ru_maxrss starts from the memory of the parent process (getrusage(2)
    after execve), which may be much larger.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
