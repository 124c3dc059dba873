"""What other processes use while something is timed."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbl_export.measure.background import (
    Reading,
    described,
    read,
    spoken,
    used_between,
)

from ..command import nbl

SHORT = ("--depth", 0, "--repetitions", 1, "--prompt-tokens", 8, "--generate-tokens", 3)


def test_others_are_all_processes_but_this_one() -> None:
    found = used_between(Reading(0, 100, 40, 3), Reading(20, 140, 64, 7))
    assert found == {"seconds": 20, "others": 0.8, "stolen": 0.2}
    assert used_between(Reading(0, 0, 0, 0), Reading(2, 1.99, 2, 0))["others"] == 0  # ticks are coarse


@pytest.mark.parametrize("busy", [0.0, 9.9])
def test_a_system_that_does_not_count_is_not_called_idle(busy: float) -> None:
    used = used_between(Reading(0, 0, 0, 0), Reading(10, busy, 20, 0))
    found = described([used, used], 4, 0)
    assert (found["others"], found["busy"]) == (None, False)
    assert "does not count" in spoken(found)


def machine(others: float, stolen: float = 0.0, **facts: Any) -> dict[str, Any]:
    found = described([{"seconds": 5.0, "others": others, "stolen": stolen}], 10, 0)
    return {**found, "cores": 2, **facts}


def test_a_tenth_of_the_cores_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbl_export.measure.background._own_cores", lambda: range(2))
    assert [machine(o, s)["busy"] for o, s in ((0.19, 0.0), (0.21, 0.0), (0.15, 0.1))] == [False, True, True]
    assert spoken(machine(0.8)) == "measured on a busy machine: other processes used 0.8 of 2 cores"
    assert spoken(machine(0.05)) == "measured while other processes used 0.05 of 2 cores"
    assert spoken(machine(0.8, 0.3)).endswith("0.8 of 2 cores, and its host took 0.3 more")


def test_waits_in_vain_are_counted() -> None:
    """Of all waits, as the record and the sentence have them; without one there is no figure of them."""
    load = {"seconds": 5.0, "others": 0.0, "stolen": 0.0}
    found = described([load, load], 10, 3)
    assert (found["waits"], found["gave_up"]) == (10, 3)
    figures = [re.findall(r"(\d+) of (\d+) runs", spoken(described([load], 10, gave_up))) for gave_up in (3, 0)]
    assert figures == [[("3", "10")], []]


def test_a_long_load_counts_for_more_than_a_short_one() -> None:
    loads = [{"seconds": s, "others": o, "stolen": 0.0} for s, o in ((9.0, 1.0), (1.0, 0.0))]
    assert described(loads, 1, 0)["others"] == pytest.approx(0.9)


def test_a_neighbour_is_seen() -> None:
    """By the counters of this machine: what a child computes is another's."""
    works = "print(flush=True)\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", works], stdout=subprocess.PIPE)
    assert neighbour.stdout is not None
    try:
        neighbour.stdout.readline()
        before, spent = read(), time.process_time()
        while time.process_time() - spent < 1.0:
            pass
        found = used_between(before, read())
    finally:
        neighbour.kill()
        neighbour.communicate()
    if found["others"] is None:
        pytest.skip("this system does not count the time of all processes")
    assert found["others"] > 0.2


def test_a_busy_machine_is_said_wherever_speed_is(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line, in the report, in the model card, and in a comparison that keeps llama-bench's columns."""
    used = {"seconds": 1.0, "others": 1e3, "stolen": 0.0}
    monkeypatch.setattr("nbl_export.measure.background.used_between", lambda before, after: used)
    said = "on a busy machine: other processes used 1000 of"
    done = nbl("bench", run, "--repetitions", 2)
    assert done.status == 0, done.err
    assert said in done.err and said in " ".join(done.out.split())
    assert nbl("card", run, "--base-model", "org/name").status == 0
    for name in ("report.md", "report.html", "model/README.md"):
        assert said in (run / name).read_text(encoding="utf-8"), name
    beside = nbl("bench", run / "model", *SHORT, "--format", "llama-bench")
    assert said in beside.err and said not in beside.out
