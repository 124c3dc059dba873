"""How far a verification goes: the same words and colour never stand for a proof and for a comparison."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.errors import NblError
from nbl_export.publish.card import check_publishable
from nbl_export.records.plan import Plan
from nbl_export.records.results import CheckResult, status_of
from nbl_export.report.console import checks_table
from nbl_export.run.progress import Ui
from nbl_export.run.stages.common import Place
from nbl_export.trust.terminal import Console
from nbl_export.verify import ladder

from .test_report import BENCH, MANIFEST, VERIFY, Written

EXACT = CheckResult("nbl", "nbl", "max abs logit difference, prefill", 7e-5, 1e-3, True, "one sequence")
COARSE = CheckResult("nbl", "nbl", "relative rms logit difference, prefill", 0.31, 0.75, True, "one sequence")
ROUNDED = CheckResult("quantised", "nbl", "relative rms logit difference, prefill", 0.05, 0.1, True, "one sequence")
TEXT = CheckResult("text", "nbl", "torch's margin where greedy text first differs", 3.5, 4.0, True)
PLAN = Plan.of(6, dict.fromkeys((0, 2, 3), "linear"))


def verified(precision: str, *checks: CheckResult) -> dict[str, Any]:
    """verify.json, as the verify stage makes it."""
    found = ladder.summary(checks, precision, VERIFY["quality_loss"], PLAN)
    proof = ladder.proof(checks, "the torch model", found["status"])
    return {**VERIFY, **found, "proof": proof}


@pytest.mark.parametrize(
    ("precision", "checks", "status"),
    [
        ("fp32", (EXACT,), "verified"),
        ("fp16", (COARSE, TEXT), "verified"),  # not quantised: the limit is 2%
        ("int4", (EXACT, ROUNDED, TEXT), "verified"),
        ("int8", (EXACT, ROUNDED), "verified"),
        ("int4", (COARSE, TEXT), "compared"),
        ("int8", (COARSE, TEXT), "compared"),
        ("int4", (ROUNDED, TEXT), "compared"),
        ("int4", (CheckResult("original", "original", EXACT.metric, 1e-5, 1e-3, True), COARSE), "compared"),
        ("int4", (EXACT, CheckResult("text", "nbl", TEXT.metric, 5.0, 4.0, False)), "failed"),
    ],
)
def test_a_quantised_graph_is_verified_by_a_twin_alone(
    precision: str, checks: tuple[CheckResult, ...], status: str
) -> None:
    assert status_of(precision, [asdict(check) for check in checks]) == status
    assert verified(precision, *checks)["status"] == status


def test_the_page_tells_a_comparison_from_a_proof() -> None:
    """Badge in both files: another word and another colour."""
    proven = Written(verify=verified("int4", EXACT, ROUNDED, TEXT))
    near = Written(verify=verified("int4", COARSE, TEXT))
    assert (proven.json["status"], near.json["status"]) == ("verified", "compared")
    badges = [re.findall(r'<p class="badge (\w*)"><strong>([^<]*)', page.html) for page in (proven, near)]
    assert badges == [[("ok", "Graph verified")], [("words", "Compared, not proven")]]
    assert "**Graph verified**" in proven.markdown and "**Compared, not proven**" in near.markdown
    for text in (near.html, near.markdown):
        body = text.replace("status: verified", "")
        assert not re.search(r"\bverified\b", body, re.IGNORECASE)
        assert "no float32 twin was checked" in body and "Do not deploy" not in body
    assert "no float32 twin was checked" not in proven.html


def test_the_console_tells_it_too(capsys: Any) -> None:
    Console(width=200).print(*checks_table(verified("int4", COARSE, TEXT)))
    said = " ".join(capsys.readouterr().out.split())
    assert "compared, but its wiring is not proven" in said and "verified" not in said.lower()
    Console(width=200).print(*checks_table(verified("int4", EXACT, ROUNDED)))
    assert "not proven" not in capsys.readouterr().out


def test_a_failed_run_is_neither() -> None:
    found = verified("int4", COARSE, TEXT)
    written = Written(manifest={**MANIFEST, "status": "failed"}, verify=found, bench=BENCH)
    assert written.json["status"] == "failed" and "Verification failed" in written.html


def test_a_run_that_was_compared_has_this_status_and_can_be_published() -> None:
    """`inspect` prints the status; the card has the badge of the page."""
    opened: Any = SimpleNamespace(read_json=lambda _name: verified("int4", COARSE, TEXT))
    assert Place(opened, Ui(quiet=True)).verdict == "compared"
    stages: dict[str, Any] = {name: {} for name in ("rewrite", "verify", "report")}
    facts = {"options": {"engine": "ort"}, "command": "", "stages": stages}
    for status in ("verified", "compared"):
        run: Any = SimpleNamespace(path=Path("r"), manifest={**facts, "status": status}, stages=stages, check=str)
        check_publishable(run, force=False)
    run.manifest = {**facts, "status": "failed"}
    with pytest.raises(NblError, match="failed verification"):
        check_publishable(run, force=False)
