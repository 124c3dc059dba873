"""The instruments of a timed run: clock, wait for idle threads, load of other processes.

Wait: an engine's threads spin for a while after their work is done; ONNX Runtime's spin for about 45 ms (two threads of
an AMD EPYC). A run timed during that period shares its cores with these threads: a prefill of 512 tokens took a tenth
longer (bench/EXPERIMENTS.md). The wait is not for other processes.

Background: cores of this process ─► busy seconds of all processes - seconds of this process = others;  stolen by the
host. Paired rounds cancel only part of this effect. So the figures are recorded with every load, and the report
mentions large ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["Instruments", "Reading", "background_of", "read_usage", "used_between", "wait_until_idle"]

_LOOK = 0.01  # seconds of one observation
_SHARE = 0.2  # share of one core that an idle process may use
_LIMIT = 1.0  # longest wait in seconds
# Share of the cores. If other processes take a tenth of the cores, a run that uses all cores can take a tenth longer:
# as much as the width of the interval at which rounds stop (`rounds.NARROW`).
_BUSY_SHARE = 0.1
# `user` includes guests on Linux, and `system` includes interrupts on Windows: do not add these again.
_WORK = ("user", "nice", "system", "irq", "softirq")


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
    seconds = after.clock - before.clock
    busy = after.busy - before.busy
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
    means: dict[str, Any] = {
        name: sum(load["seconds"] * load[name] for load in known) / seconds if known else None
        for name in ("others", "stolen")
    }
    cores = len(_own_cores())
    busy = bool(known) and sum(means.values()) > _BUSY_SHARE * cores
    return {"cores": cores, **means, "waits": waits, "gave_up": gave_up, "busy": busy}


# -- all of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruments:
    """The instruments of a timed run.

    clock: monotonic nanoseconds. idle: waits until no thread of this process computes; False if a thread still
    computes. usage: processor time of the machine, read before and after each load. clocks: of a GPU, read behind each
    timed run. warm_up_ns, least_ns: an untimed run, and a timed run, is repeated until it took so long.
    """

    clock: Callable[[], int] = time.perf_counter_ns
    idle: Callable[[], bool] = wait_until_idle
    usage: Callable[[], Reading] = read_usage
    clocks: Callable[[], Mapping[str, Any] | None] | None = None
    warm_up_ns: int = 0
    least_ns: int = 0
