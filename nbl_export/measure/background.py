"""Processor time that other processes used during a timed run.

    cores of this process ─► busy seconds of all processes - seconds of this process = others;  stolen by the host

A timed run shares cores and memory with other processes. Paired rounds cancel only part of this effect. So the figures
are recorded with every load, and the report mentions large ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

__all__ = ["Reading", "described", "is_busy", "read", "spoken", "used_between"]

# Share of the cores. If other processes take a tenth of the cores, a run that uses all cores can take a tenth longer:
# as much as the width of the interval at which rounds stop (`rounds.NARROW`).
_BUSY_SHARE = 0.1
# `user` includes guests on Linux, and `system` includes interrupts on Windows: do not add these again.
_WORK = ("user", "nice", "system", "irq", "softirq")


@dataclass(frozen=True)
class Reading:
    """Seconds since a fixed moment: wall clock, and processor time of all processes, of this one, and of the host."""

    clock: float
    busy: float
    own: float
    stolen: float


def read() -> Reading:
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


def described(loads: Sequence[Mapping[str, Any]], waits: int, gave_up: int) -> dict[str, Any]:
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


def spoken(found: Mapping[str, Any]) -> str:
    """The value of `described` in words that continue "speed was", without a full stop."""
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
