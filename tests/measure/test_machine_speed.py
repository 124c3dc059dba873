"""What a machine reads a second, and what decoding reads of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export.measure import machine_speed


def test_the_rate_is_that_of_the_best_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_speed, "best_seconds", lambda run: (run(), 0.5)[1])
    monkeypatch.setattr(machine_speed, "READ_BYTES", 1 << 19)
    read = machine_speed.read_bytes_per_second.__wrapped__
    assert read(1) == read(3) == 2.0 * (1 << 19)


def test_a_run_says_what_its_decoders_read(finished: Path) -> None:
    bench = json.loads((finished / "bench.json").read_text(encoding="utf-8"))
    found, (first, *_) = bench["reads"], [t for t in bench["timings"] if t["kind"] == "tg"]
    assert (found["test"], found["depth"], found["threads"]) == (first["test"], first["depth"], bench["threads"][0])
    assert set(found["bytes_per_second"]) == {"original", "nbl"}
    assert min(*found["bytes_per_second"].values(), found["machine_bytes_per_second"]) > 0
    is_said = "weights and caches are read at " in (finished / "report.md").read_text(encoding="utf-8")
    assert is_said == (max(found["bytes_per_second"].values()) <= found["machine_bytes_per_second"])
