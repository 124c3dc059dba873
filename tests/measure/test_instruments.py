"""The instruments of a timed run: the wait for idle threads, what other processes use, and the clocks of a GPU."""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from nbl_export.measure import clocks
from nbl_export.measure.clocks import read_clocks
from nbl_export.measure.instruments import Reading, background_of, read_usage, used_between, wait_until_idle
from nbl_export.records.results import describe_background

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("cores_used", "looks"),
    [((0.0,), 1), ((1.0, 1.0, 0.9, 0.1), 4), ((0.19,), 1), ((0.21, 0.0), 2), (itertools.repeat(1.0), 30)],
)
def test_waits_while_a_fifth_of_a_core_is_used_and_no_longer_than_the_limit(
    cores_used: tuple[float, ...], looks: int
) -> None:
    slept: list[float] = []
    used, shares = 0.0, iter(cores_used)

    def sleep(seconds: float) -> None:
        nonlocal used
        slept.append(seconds)
        used += seconds * next(shares)

    idle = wait_until_idle(lambda: used, sleep, limit=0.3)
    assert len(slept) == looks
    assert idle is (looks < 30)  # it says that it gave up
    assert sum(slept) <= 0.3 + 1e-9


# -- other processes ------------------------------------------------------------------------------------------


def test_others_are_all_processes_but_this_one() -> None:
    found = used_between(Reading(0, 100, 40, 3), Reading(20, 140, 64, 7))
    assert found == {"seconds": 20, "others": 0.8, "stolen": 0.2}
    assert used_between(Reading(0, 0, 0, 0), Reading(2, 1.99, 2, 0))["others"] == 0  # ticks are coarse


@pytest.mark.parametrize("busy", [0.0, 9.9])
def test_a_system_that_does_not_count_is_not_called_idle(busy: float) -> None:
    used = used_between(Reading(0, 0, 0, 0), Reading(10, busy, 20, 0))
    found = background_of([used, used], 4, 0)
    assert (found["others"], found["busy"]) == (None, False)
    assert "does not count" in describe_background(found)


def machine(others: float, stolen: float = 0.0, **facts: Any) -> dict[str, Any]:
    found = background_of([{"seconds": 5.0, "others": others, "stolen": stolen}], 10, 0)
    return {**found, "cores": 2, **facts}


def test_a_tenth_of_the_cores_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbl_export.measure.instruments._own_cores", lambda: range(2))
    assert [machine(o, s)["busy"] for o, s in ((0.19, 0.0), (0.21, 0.0), (0.15, 0.1))] == [False, True, True]
    assert describe_background(machine(0.8)) == "measured on a busy machine: other processes used 0.8 of 2 cores"
    assert describe_background(machine(0.05)) == "measured while other processes used 0.05 of 2 cores"
    assert describe_background(machine(0.8, 0.3)).endswith("0.8 of 2 cores, and its host took 0.3 more")


def test_waits_in_vain_are_counted() -> None:
    """Of all waits, as the record and the sentence have them; without one there is no figure of them."""
    load = {"seconds": 5.0, "others": 0.0, "stolen": 0.0}
    found = background_of([load, load], 10, 3)
    assert (found["waits"], found["gave_up"]) == (10, 3)
    sentences = [describe_background(background_of([load], 10, gave_up)) for gave_up in (3, 0)]
    figures = [re.findall(r"(\d+) of (\d+) runs", said) for said in sentences]
    assert figures == [[("3", "10")], []]


def test_a_long_load_counts_for_more_than_a_short_one() -> None:
    loads = [{"seconds": s, "others": o, "stolen": 0.0} for s, o in ((9.0, 1.0), (1.0, 0.0))]
    assert background_of(loads, 1, 0)["others"] == pytest.approx(0.9)


def test_a_neighbour_is_seen() -> None:
    """By the counters of this machine: what a child computes is another's."""
    works = "print(flush=True)\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", works], stdout=subprocess.PIPE)
    assert neighbour.stdout is not None
    try:
        neighbour.stdout.readline()
        before, spent = read_usage(), time.process_time()
        while time.process_time() - spent < 1.0:
            pass
        found = used_between(before, read_usage())
    finally:
        neighbour.kill()
        neighbour.communicate()
    if found["others"] is None:
        pytest.skip("this system does not count the time of all processes")
    assert found["others"] > 0.2


# -- clocks of a GPU -----------------------------------------------------------------------------------------


SECOND = b"0000:65:00.0"  # the GPU that CUDA_VISIBLE_DEVICES names, of several


class Nvml:
    """Answers as libnvidia-ml does: values through pointers, 0 for success."""

    def __init__(self, status: int = 0, reasons: int = 0) -> None:
        self.status, self.reasons = status, reasons

    def nvmlInitWithFlags(self, _flags: int) -> int:
        return 0

    def nvmlDeviceGetHandleByPciBusId_v2(self, address: ctypes.c_char_p, device: Any) -> int:
        ctypes.cast(device, ctypes.POINTER(ctypes.c_void_p)).contents.value = 4711
        return 0 if address.value == SECOND else 6  # NVML_ERROR_NOT_FOUND

    def nvmlSystemGetDriverVersion(self, text: Any, _length: ctypes.c_uint) -> int:
        text.value = b"580.65.06"
        return 0

    def nvmlDeviceGetClockInfo(self, device: Any, kind: ctypes.c_uint, out: Any) -> int:
        assert ctypes.cast(device, ctypes.c_void_p).value == 4711
        out._obj.value = {1: 1980, 2: 2619}[kind.value]
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, _device: Any, out: Any) -> int:
        out._obj.value = 700_000
        return self.status

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _device: Any, out: Any) -> int:
        out._obj.value = self.reasons
        return self.status


def test_driver_clocks_and_power_limit_are_read_of_the_gpu_that_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml")

    def clocks_by(library: Nvml | None, address: str = SECOND.decode()) -> dict[str, Any] | None:
        def load(name: str) -> Nvml:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        monkeypatch.setattr(pynvml, "nvmlLib", None)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.setattr(pynvml, "CDLL", load)
        monkeypatch.setattr(clocks, "bus_id", lambda: address)
        return read_clocks()

    known = {"driver": "580.65.06", "sm_mhz": 1980, "memory_mhz": 2619}
    slowed = {"power_limit_watts": 700.0, "slowed_by": ["power limit", "temperature"]}
    assert clocks_by(Nvml(reasons=0x1 | 0x4 | 0x20)) == {**known, **slowed}
    assert clocks_by(Nvml(status=3)) == known
    assert clocks_by(Nvml(), "0000:01:00.0") is None, "NVML does not know it"
    assert clocks_by(Nvml(), "") is None, "the driver does not say"
    assert clocks_by(None) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert read_clocks() is None
