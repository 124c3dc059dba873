"""When the user is told that the price is not the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.price import warn_of_far_prices
from nbl_export.report import render

from .test_report import BENCH, MANIFEST, VERIFY


def rows(*increases: float) -> list[dict[str, object]]:
    return [
        {"text": f"text {k}", "perplexity_original": 20.0, "perplexity_nbl": 20.0 * (1 + increase)}
        for k, increase in enumerate(increases)
    ]


@pytest.mark.parametrize(
    "increases", [(), (0.5,), (0.5, 0.5), (0.3, 0.59), (0.6, 0.31), (0.001, 0.04), (-0.01, 0.049), (-0.1, -0.2)]
)
def test_prices_that_are_near(increases: tuple[float, ...]) -> None:
    assert warn_of_far_prices(rows(*increases)) is None


@pytest.mark.parametrize(
    ("increases", "parts"),
    [
        ((0.24, 1.34), ("+24% on text 0", "+134% on text 1")),
        ((0.61, 0.3), ("+30% on text 1", "+61% on text 0")),
        ((0.2, 0.5, 0.3), ("+20% on text 0", "+50% on text 1")),
        ((-0.01, 0.06), ("-1% on text 0", "+6% on text 1")),
    ],
)
def test_prices_that_are_far(increases: tuple[float, ...], parts: tuple[str, ...]) -> None:
    said = warn_of_far_prices(rows(*increases))
    assert said is not None and all(part in said for part in parts)


def test_report_says_so(tmp_path: Path) -> None:
    for warning, expected in (("the price differs by text: so & so", True), (None, False)):
        render(MANIFEST, {**VERIFY, "price_warning": warning}, BENCH, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert ("the price differs by text: so &amp; so" in page) is expected
        assert ("the price differs by text" in (tmp_path / "report.md").read_text()) is expected
    render(MANIFEST, VERIFY, BENCH, tmp_path)  # of a verification that did not say
