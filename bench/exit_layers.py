"""What jobs with predicted KV give: the exit layer, loss behind a prompt, speed, and the time of the job.

    nbl-export --model MODEL --output DIR                                       the default job
    nbl-export eval DIR --tasks DATA/lambada_openai.yaml --limit 500            last words of passages
    python bench/exit_layers.py "SmolLM2-135M=DIR" ... > RESULT.json

Each argument is TITLE=DIR. Losses are those of the report: of windows that neither fitted nor chose. Samples of each
load are kept, and the loss of each window. A run without a benchmark has no speed.
"""

from __future__ import annotations

import json
from typing import Any

from exchange import main, samples_of

from nbl_export.evaluation.results import read_entries
from nbl_export.evaluation.results import summarize as summarize_tasks
from nbl_export.report.page import summarize
from nbl_export.run_directory import BENCH_FILE, EVAL_FILE, VERIFY_FILE, RunDirectory

_RESULTS = {"verify": VERIFY_FILE, "bench": BENCH_FILE}


def _read(run: RunDirectory, name: str) -> Any:
    return json.loads((run.path / name).read_text(encoding="utf-8"))


def row_of(title: str, run: RunDirectory) -> dict[str, Any]:
    """One column of the README's table, with the numbers that it follows from."""
    verify, bench = (_read(run, name) if stage in run.stages else None for stage, name in _RESULTS.items())
    report = summarize(run.manifest, verify or {}, bench)
    scores = summarize_tasks(read_entries(run.path / EVAL_FILE))
    return {
        "title": title,
        "exit": report["exit"],
        "num_layers": report["num_layers"],
        "limit": (report["goal"] or {}).get("max_perplexity_increase"),
        "path": (report["goal"] or {}).get("path", []),
        "points": (report["curve"] or {}).get("points", []),
        "losses": report["quality_loss"],
        "long_range": report.get("long_range"),
        "rows": samples_of(report["rows"]),
        "background": (report["bench"] or {}).get("background"),
        "cache_bytes_per_token": report["cache_bytes_per_token"],
        "tasks": scores["table"],
        "seconds": {name: stage["seconds"] for name, stage in run.stages.items() if name != "eval"},
    }


if __name__ == "__main__":
    main(row_of)
