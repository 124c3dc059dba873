"""Memory that a process can take: the machine's, or what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from nbl_export.model import memory

MACHINE = 1000


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of control groups of a machine with `MACHINE` bytes; tmp_path/own names those of the process."""
    monkeypatch.setattr(memory, "_ROOT", tmp_path / "groups")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=MACHINE))
    return tmp_path / "groups"


def group(directory: Path, version: int, limit: object, used: int, **pages: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, used), strict=True):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in {"anon": 7, **pages}.items()))


def own(system: Path, *lines: str) -> None:
    (system.parent / "own").write_text("\n".join(lines) + "\n")


def test_the_machine_alone(system: Path) -> None:
    assert memory.available_bytes() == MACHINE  # another system: there is no such file
    own(system, "0::/user")
    assert memory.available_bytes() == MACHINE  # groups that are not seen from here
    group(system / "user", 2, "max", 10)
    assert memory.available_bytes() == MACHINE


def test_a_limit_counts_and_file_pages_can_be_dropped(system: Path) -> None:
    own(system, "0::/box/inner")
    group(system / "box/inner", 2, 900, 500, active_file=100, inactive_file=50)
    assert memory.available_bytes() == 900 - 500 + 150
    group(system / "box", 2, 600, 500, active_file=100, inactive_file=50)
    assert memory.available_bytes() == 600 - 500 + 150  # of a group around it
    group(system, 2, 400, 500)
    assert memory.available_bytes() == 0  # a container that sees its own group as the root


def test_the_first_version_of_control_groups(system: Path) -> None:
    own(system, "5:cpu:/other", "4:hugetlb,memory:/box", "0::/")
    group(system / "memory/box", 1, 700, 300, total_active_file=20, total_inactive_file=30, active_file=99)
    assert memory.available_bytes() == 450
    group(system / "memory/box", 1, 2**63, 300)
    assert memory.available_bytes() == MACHINE
