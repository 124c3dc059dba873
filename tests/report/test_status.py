"""The status of a verification, its sentences and its warnings: on the page, in the console and on a card."""

from __future__ import annotations

import re
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

from nbl_export.records.plan import Plan
from nbl_export.records.results import CheckResult, status_of
from nbl_export.report.console import checks_table
from nbl_export.run.progress import Ui
from nbl_export.run.stages.common import StageContext
from nbl_export.trust.terminal import Console
from nbl_export.verify import ladder

from .test_report import VERIFY, Written

WIRING = CheckResult("nbl", "nbl", "relative rms logit difference, prefill", 7e-6, 1e-4, True, "one sequence")
SHIPPED = CheckResult("shipped", "nbl", "relative rms logit difference, prefill", 0.05, 0.1, True, "one sequence")
ROUNDED = CheckResult("exporter", "original", ladder.PERPLEXITY, 0.15, 1.0, True, "11.50 against 10.00")
TORCH = CheckResult("exporter", "original", "relative rms logit difference from torch", 2e-6, 1e-4, True, "one pass")
TEXT = CheckResult("text", "nbl", "the reference's margin where greedy text first differs", 3.5, 1.0, False)
WARNING = "int4 alone raises the original's perplexity by 15%"
PLAN = Plan.of(6, dict.fromkeys((0, 2, 3), "linear"))


def verified(precision: str, *checks: CheckResult, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    """verify.json, as the verify stage makes it."""
    found = ladder.summary(checks, precision, VERIFY["quality_loss"], PLAN)
    return {**VERIFY, **found, "proof": ladder.proof(checks, found["status"]), "warnings": list(warnings)}


def test_a_failed_check_fails_the_run() -> None:
    assert status_of([asdict(WIRING), asdict(SHIPPED)]) == "verified"
    assert status_of([asdict(WIRING), asdict(TEXT)]) == "failed"
    opened: Any = SimpleNamespace(read_json=lambda _name: verified("int4", WIRING, TEXT), stages={"verify": {}})
    assert StageContext(opened, Ui(quiet=True)).verdict == "failed"


def test_what_is_proven_is_said() -> None:
    said = verified("int4", WIRING, SHIPPED, ROUNDED)["proof"]
    assert "7.0e-06 of the size of the logits" in said[0] and "+15.0% of the torch model's" in said[1]
    assert "5.0%" in said[2]
    assert "the torch model differ by 2.0e-06" in verified("fp32", WIRING, TORCH)["proof"][1]
    (alone,) = verified("int4", WIRING, TEXT)["proof"]
    assert alone.startswith("Nothing is proven")


def test_the_page_and_the_console_show_warnings(capsys: Any) -> None:
    found = verified("int4", WIRING, ROUNDED, warnings=(WARNING,))
    page = Written(verify=found)
    assert page.json["status"] == "verified" and re.search(r'<p class="badge ok"><strong>Numerics verified', page.html)
    assert f"Note: {WARNING}." in page.markdown
    Console(width=200).print(*checks_table(found))
    assert WARNING in " ".join(capsys.readouterr().out.split())
