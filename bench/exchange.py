"""What linear layers reach within a limit on quality: layers, loss, and modelled and measured speed.

    nbl-export --model MODEL --exit-layer none --max-perplexity-increase 10% --output DIR
    python bench/exchange.py "SmolLM2-135M, linear layers within 10%=DIR" ... > RESULT.json

Each argument is TITLE=DIR, of runs that have at least a plan. A run with a benchmark has samples of speed too. Losses
are those of the validation windows, of the largest set that kept the limit. Seconds are of the stages that ran.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.run_directory import REPORT_JSON, RunDirectory

_FACTS = ("increase", "increase_interval", "tokens")
_OF_ROW = ("variant", "test", "depth", "loads", "samples")


def row_of(title: str, run: RunDirectory) -> dict[str, Any]:
    """One row of the table.

    Raises:
        ValueError: the run has no limit on quality that it keeps.
    """
    facts = run.manifest
    kept = [step for step in (facts.get("goal") or {}).get("path", []) if step["within"]]
    if not kept:
        raise ValueError(f"{title}: {run.path} keeps no limit on quality")
    best = max(kept, key=lambda step: int(step["layers"]))
    points = {point["layers"]: point for point in facts["curve"]["points"]}
    report = run.path / REPORT_JSON
    timed = json.loads(report.read_text(encoding="utf-8"))["rows"] if "bench" in run.stages else []
    return {
        "title": title,
        "limit": facts["goal"]["max_perplexity_increase"],
        "fit": facts["fit"],
        "layers": {kind: [i for i, k in zip(facts["replaced_layers"], facts["kinds"], strict=True) if k == kind]
                   for kind in sorted(set(facts["kinds"]))},
        "losses": [{name: loss[name] for name in _FACTS} for loss in best["quality_losses"]],
        "modelled": {name: points[best["layers"]][name] for name in ("prefill", "decode")},
        "rows": samples_of(timed),
        "seconds": {name: stage["seconds"] for name, stage in run.stages.items() if name != "eval"},
    }  # fmt: skip


def samples_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the tables compute ratios of speed from, of the rows of a report."""
    return [{name: row[name] for name in _OF_ROW} for row in rows]


def main(row_of: Callable[[str, RunDirectory], dict[str, Any]]) -> None:
    """Print a row of each run that the command line names."""
    named = (argument.rpartition("=") for argument in sys.argv[1:])
    rows = [row_of(title, RunDirectory.peek(Path(path))) for title, _, path in named]
    json.dump({"rows": rows}, sys.stdout, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main(row_of)
