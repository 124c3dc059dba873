"""The sweep of a run: which order it takes, and how it reaches the report. Its values: tests/plan/test_planning.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nbl_export.plan.greedy import Judge
from nbl_export.report import console as printed
from nbl_export.report import plots

from ..command import assert_refused, nbl
from ..tiny import LAYERS


def facts_of(run: Path) -> Any:
    return json.loads((run / "nbl.json").read_text(encoding="utf-8"))


def point(method: str, layers: int, increase: float | None) -> dict[str, Any]:
    upper = None if increase is None else increase
    return {"method": method, "layers": layers, "worst_increase": increase, "worst_upper": upper,
            "prefill": 1 + layers / 10}  # fmt: skip


class Counted(Judge):
    """A judge that counts its rounds of trials."""

    rounds = 0

    def alone(self, progress: Any) -> Any:
        Counted.rounds += 1
        return super().alone(progress)


def test_sweep_leaves_the_run_verified_and_shows_in_its_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the order that the run recorded, and records what it adds."""
    monkeypatch.setattr("nbl_export.plan.order.Judge", Counted)
    monkeypatch.setattr(Counted, "rounds", 0)
    assert "Quality against speed" not in (run / "report.md").read_text()
    done = nbl("plan", run, "--sweep")
    assert done.status == 0, done.err
    assert "plan: reused" in done.err and "sweep: done" in done.err and "report: done" in done.err
    assert "rewrite" not in done.err.replace("rewrite: reused", "") and "verify: reused" in done.err
    assert "modelled speed" in done.out
    assert facts_of(run)["status"] == "verified"
    report = (run / "report.md").read_text()
    assert "Quality against speed" in report and "All points of the sweep" in report
    assert "var(--nbl" in re.findall(r'id="tradeoff-.*?</figure>', (run / "report.html").read_text(), re.DOTALL)[0]
    again = nbl("plan", run, "--sweep")
    assert "sweep: reused" in again.err and again.out == done.out and Counted.rounds == 0
    assert "report: reused" in nbl("report", run).err
    longer = nbl("plan", run, "--sweep", "--max-layers", "2")
    assert "sweep: done" in longer.err and Counted.rounds == 1
    kept = facts_of(run)["greedy"]
    assert len(kept["steps"]) == 2
    assert nbl("plan", run, "--layers", "2").status == 0
    assert facts_of(run)["greedy"] == kept and Counted.rounds == 1
    assert (
        "sweep: reused" in nbl("plan", run, "--sweep", "--max-layers", "2").err
    )  # a sweep does not depend on the count


def test_bad_lengths_are_refused(run: Path) -> None:
    assert_refused(nbl("plan", run, "--sweep", "--max-layers", LAYERS), 1, f"--max-layers {LAYERS}", "must keep one")
    assert_refused(nbl("plan", run, "--max-layers", "1"), 2, "--max-layers", "needs --sweep")


def test_plot_rings_the_recommended_point_and_leaves_out_what_is_not_finite() -> None:
    points = [point("nbl", k, 0.03 * k) for k in range(4)] + [point("drop", 0, 0.0), point("drop", 1, None)]
    drawn = plots.tradeoff(points, {"method": "nbl", "layers": 3})
    assert "3 layers" in drawn and "attention dropped" in drawn and "distilled" not in drawn
    assert "3 layers" not in plots.tradeoff(points, None)
    assert drawn == plots.tradeoff(points, {"method": "nbl", "layers": 3})


def test_plot_has_whiskers_of_the_text_that_suffers_most() -> None:
    points = [point("nbl", k, 0.03 * k) for k in range(4)]
    bare = plots.tradeoff(points, None)
    points[2]["quality_losses"] = [{"increase": 0.02, "increase_interval": [0.018, 0.021]},
                           {"increase": 0.06, "increase_interval": [0.052, 0.068]}]  # fmt: skip
    assert plots._worst_interval(points[2]) == [[0.052, 0.068]] and plots._worst_interval(points[1]) == []
    drawn = plots.tradeoff(points, None)
    assert drawn.count('id="tradeoff-line2d') == bare.count('id="tradeoff-line2d') + 1


def test_table_says_what_is_not_finite_and_what_was_distilled_for_more_layers() -> None:
    from rich.console import Console

    quality_loss = {"text": "t", "kl": None, "perplexity_original": 5.0, "perplexity": None, "increase": None,
             "increase_interval": None, "kl_interval": None}  # fmt: skip
    p = {**point("distilled", 1, None), "prefill_tail_pruned": 1.2, "decode": 1.1, "quality_losses": [quality_loss]}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    points = [{**p, "distilled_for": 1}, {**p, "distilled_for": 3}]
    console.print(printed.sweep_table({"order": [1], "texts": ["t"], "points": points, "recommended": None}))
    told = console.export_text()
    assert "not finite" in told and "distilled for 3" in told and "distilled for 1" not in told
