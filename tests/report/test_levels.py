"""The level of speed intervals on the page: that of the number of loads, or of the rule that ended them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from nbl_export.report.console import speed_table
from nbl_export.report.page import summarize
from nbl_export.trust.terminal import Console

from .test_report import BENCH, MANIFEST, VERIFY, Written, changed


def of_loads(count: int, repetitions: int | None) -> Any:
    """A benchmark in which every decoder ran on so many loads."""
    bench = changed(BENCH, repetitions=repetitions)
    for timing in bench["timings"]:
        longer = 5 * copy.deepcopy(timing["samples_ns"])
        timing |= {"samples_ns": longer[:count], "loads": list(range(count))}
    return bench


@pytest.mark.parametrize(
    ("count", "repetitions", "said", "confidence"),
    [
        (5, 5, "93.8% range of 5 loads", 0.9375),
        (6, 6, "96.9% interval of 6 loads", 0.96875),
        (7, 7, "98.4% interval of 7 loads", 0.984375),
        (16, 16, "97.9% interval of 16 loads", 0.97873),
        (6, None, "94.4% interval of 6 loads, ended by its width", 0.944),
        (12, None, "94.4% interval of 12 loads, ended by its width", 0.944),
    ],
)
def test_every_writer_gives_the_level_of_the_loads(
    count: int, repetitions: int | None, said: str, confidence: float, capsys: Any
) -> None:
    bench = of_loads(count, repetitions)
    written = Written(bench=bench)
    assert {ratio["interval"] for ratio in written.json["ratios"]} == {said}
    assert written.json["ratios"][0]["confidence"] == pytest.approx(confidence, abs=1e-5)
    assert [row[-1] for row in written.table("Paired ratios")[2:]] == [said] * 3
    assert written.html.count(said) >= 3
    Console(width=400).print(*speed_table(summarize(MANIFEST, VERIFY, bench)))
    assert capsys.readouterr().out.count(said) == 3
