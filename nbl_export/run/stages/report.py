"""The report stage: writes all results of a run as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.records.from_json import edited
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import Place
from nbl_export.run_directory import BENCH_FILE, EVAL_FILE, LOSSLESS_FILE, SWEEP_FILE, VERIFY_FILE

__all__ = ["ReportInputs", "declare", "run"]


@dataclass(frozen=True)
class ReportInputs:
    """Nothing beside what earlier stages left."""


def declare(_r: Resolver) -> ReportInputs:
    return ReportInputs()


def run(_inputs: ReportInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write the report as HTML, Markdown and JSON."""
    from nbl_export.report import page

    def left(stage: str, name: str) -> Any:
        return place.run.read_json(name) if stage in place.run.stages else None

    verify = place.run.read_json(VERIFY_FILE)
    benchmark, sweep = left("bench", BENCH_FILE), left("sweep", SWEEP_FILE)
    quality, lossless = left("eval", EVAL_FILE), left("lossless", LOSSLESS_FILE)
    with edited(
        place.run.path, "remove its verify.json, bench.json, sweep.json and eval.json, or start over with --force"
    ):
        page.render({**place.run.manifest, "status": place.verdict}, verify, benchmark, out, sweep, quality, lossless)
    return {"status": place.verdict}
