"""Energy counters: files as Linux has them, and machines that tell nothing."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from nbl_export.measure import energy
from nbl_export.measure.energy import Meter, find_meter


def zone(powercap: Path, name: str, title: str, energy: int, wraps: int = 1000) -> Path:
    (powercap / name).mkdir(parents=True)
    for file, value in (("name", title), ("energy_uj", energy), ("max_energy_range_uj", wraps)):
        (powercap / name / file).write_text(f"{value}\n")
    return powercap / name / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    first, second = zone(tmp_path, "intel-rapl:0", "package-0", 100), zone(tmp_path, "intel-rapl:1", "package-1", 200)
    part, all_of_it = zone(tmp_path, "intel-rapl:0:0", "core", 5), zone(tmp_path, "intel-rapl:2", "psys", 7)
    meter = find_meter(gpu=False, powercap=tmp_path)
    assert meter is not None and meter.sources == ("package 0", "package 1")
    assert meter.read() == 0
    for file, value in ((first, 130), (second, 205), (part, 900), (all_of_it, 900)):
        file.write_text(f"{value}\n")
    assert meter.read() == 35


def test_a_counter_that_wraps_goes_on(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 990)
    meter = find_meter(gpu=False, powercap=tmp_path)
    assert meter is not None
    for value, total in ((995, 5), (3, 13), (10, 20)):
        counter.write_text(f"{value}\n")
        assert meter.read() == total


@pytest.mark.parametrize("missing", ["energy_uj", "max_energy_range_uj", "name"])
def test_what_cannot_be_read_is_no_meter(missing: str, tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (tmp_path / "intel-rapl:0" / missing).unlink()
    assert find_meter(gpu=False, powercap=tmp_path) is None
    assert find_meter(gpu=True, powercap=tmp_path / "none", libraries=("libnowhere.so.1",)) is None


def test_counters_without_a_range_only_grow() -> None:
    values = iter([7, 9, 20])
    meter = Meter({"GPU": (lambda: next(values), 0)})
    assert [meter.read(), meter.read()] == [2, 13]


class Nvml:
    """Answers as libnvidia-ml does: values through pointers, 0 for success."""

    def __init__(self, millijoules: int, gpus: int = 1, status: int = 0) -> None:
        self.millijoules, self.gpus, self.status = millijoules, gpus, status

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, _index: int, device: Any) -> int:
        device._obj.value = 4711
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: ctypes.c_void_p, millijoules: Any) -> int:
        assert device.value == 4711
        millijoules._obj.value = self.millijoules
        return self.status


def test_millijoules_of_a_gpu_are_read_as_microjoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, library = zone(tmp_path, "intel-rapl:0", "package-0", 100), Nvml(70)
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda _name: library)
    meter = find_meter(gpu=True, powercap=tmp_path)
    assert meter is not None and meter.sources == ("package 0", "GPU")
    library.millijoules = 75
    assert meter.read() == 5000
    counter.write_text("130")
    assert meter.read() == 5030
    processor = find_meter(gpu=False, powercap=tmp_path)
    assert processor is not None and processor.sources == ("package 0",)


@pytest.mark.parametrize("library", [Nvml(70, gpus=0), Nvml(70, gpus=2), Nvml(70, status=3)], ids=["0", "2", "old"])
def test_no_gpu_several_or_one_without_a_counter_is_no_meter(
    library: Nvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda _name: library)
    assert find_meter(gpu=True, powercap=tmp_path) is None
