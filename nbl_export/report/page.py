"""What the other stages found -> one page for people, the same as Markdown, the same as JSON.

    nbl.json, verify.json, bench.json ─► summarize ─► report.json ─► document ─► html     ─► report.html
                                                                             └► markdown ─► report.md

`document` says what stands on the page, as blocks. Both files are written from these blocks.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.files import write_json
from nbl_export.records.from_json import edited
from nbl_export.records.paired import figures
from nbl_export.records.results import FAILED, status_of
from nbl_export.report import model, quality, speed
from nbl_export.report.document import Document, html, markdown
from nbl_export.report.outcome import outcome
from nbl_export.run_directory import (
    BENCH_FILE,
    EVAL_FILE,
    REPORT_HTML,
    REPORT_JSON,
    REPORT_MD,
    VERIFY_FILE,
    RunDirectory,
)

__all__ = ["ADVICE", "codes_of", "document", "first_screen", "of_run", "render", "results_of", "summarize"]

_COPIED = ("model", "options", "command", "versions", "calibration", "num_layers", "replaced_layers", "kinds", "exit",
           "tap", "select", "logits", "goal", "curve", "torch_device")  # fmt: skip


def render(
    manifest: dict[str, Any],
    verify: dict[str, Any],
    bench: dict[str, Any] | None,
    out: Path,
    quality: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write report.html, report.md and report.json into `out`; the same input gives the same bytes.

    Args:
        manifest: nbl.json.
        verify: verify.json.
        bench: bench.json, or None if speed was not measured.
        out: an existing directory.
        quality: eval.json, or None if no benchmark was run.

    Returns:
        The value of report.json.

    Raises:
        CorruptError: the two variants of a test have different numbers of rounds.
    """
    report = summarize(manifest, verify, bench, quality)
    page = document(report)
    (out / REPORT_HTML).write_text(html(page, _drawings(report)), encoding="utf-8")
    (out / REPORT_MD).write_text(markdown(page), encoding="utf-8")
    write_json(out / REPORT_JSON, report)
    return report


# -- values --------------------------------------------------------------------------------------------------


def of_run(run: RunDirectory) -> dict[str, Any]:
    """The value of report.json, from what the other stages left. So nobody needs to read report.json.

    Raises:
        CorruptError: a result is missing, or its values contradict each other.
    """
    results = results_of(run)
    with edited(run.path, ADVICE):
        found = summarize(run.manifest, *results)
        document(found), outcome(found)  # reads every value
    return found


_ACTIVATIONS = "activations too, with a scale a token"
ADVICE = "remove its verify.json, bench.json and eval.json, or start over with --force"


def results_of(run: RunDirectory) -> list[Any]:
    """Content of verify.json, and of bench.json and eval.json, or None for a stage that has not run."""
    stages = {"verify": VERIFY_FILE, "bench": BENCH_FILE, "eval": EVAL_FILE}
    return [run.read_json(name) if stage in run.stages else None for stage, name in stages.items()]


def summarize(
    manifest: dict[str, Any],
    verify: dict[str, Any],
    bench: dict[str, Any] | None,
    quality: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The value of report.json, a function of its inputs; figures that are not finite become None."""
    manifest = _without_places(_finite(manifest))
    verify = _finite(verify)
    measured = bench or {}
    checks = verify["checks"]
    return {
        "schema": 1,
        "status": FAILED if not verify["passed"] or manifest["status"] == FAILED else status_of(checks),
        **{name: manifest.get(name) for name in _COPIED},
        "scores": manifest.get("scores", []),
        "stage_seconds": {name: stage["seconds"] for name, stage in manifest.get("stages", {}).items()},
        "precision": verify["precision"],
        "codes": codes_of(manifest),
        "checks": checks,
        "proof": verify.get("proof", []),
        "warnings": verify.get("warnings", []),
        "largest_logit_difference": _largest_logit_difference(checks),
        "quality_loss": verify.get("quality_loss", []),
        "long_range": verify.get("long_range_by_text") or [],
        "retrieval": _retrieval(manifest.get("goal") or {}),
        "texts": verify.get("texts", []),
        "answers": verify.get("answers", []),
        "passage": verify.get("passage", ""),
        "fit": manifest.get("fit", {}).get("kind"),
        "without_original": manifest.get("fit", {}).get("kind") == "given",
        "quality": {k: quality.get(k, []) for k in ("lm_eval", "table", "length")} if quality else None,
        "quality_warning": verify.get("quality_warning"),
        "cache_bytes_per_token": verify["cache_bytes_per_token"],
        "engines": manifest.get("engines"),
        **figures(measured),
        "variants": measured.get("variants", {}),
        "machine": measured.get("machine"),
        "bench": {k: v for k, v in measured.items() if k not in ("machine", "timings", "variants")} if bench else None,
    }


def _retrieval(goal: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A row of each kind of retrieval items, as it decided what was chosen."""
    held = [tested for tested in goal.get("path") or () if tested["within"]]
    chosen: Mapping[str, Any] = max(held, key=lambda tested: tested["layers"], default={})
    return chosen.get("retrieval") or []


def _without_places(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with names in place of absolute paths: a report is passed on, and nbl.json has the paths."""
    options = {k: list(map(_name, v)) if isinstance(v, list) else _name(v) for k, v in manifest["options"].items()}
    command = str(manifest["command"])
    with contextlib.suppress(ValueError):  # quotes that do not close
        for word in shlex.split(command):
            command = command.replace(shlex.quote(word), shlex.quote(_name(word)))
    model = {**manifest["model"], "name": _name(manifest["model"]["name"])}
    return {**manifest, "options": options, "command": command, "model": model}


def _name(value: Any) -> Any:
    return (Path(value).name or value) if isinstance(value, str) and Path(value).is_absolute() else value


def _largest_logit_difference(checks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The largest comparison with the reference (checks original and nbl); not finite is larger than any number."""
    logits = [r for r in checks if r["check"] in ("original", "nbl") and "logit" in r["metric"].lower()]
    return max(logits, key=lambda r: math.inf if r["value"] is None else r["value"]) if logits else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def codes_of(manifest: Mapping[str, Any]) -> str | None:
    """What the precision does not say: whose codes a graph has, or that activations are rounded; None for neither."""
    if manifest.get("rounds_activations"):
        return _ACTIVATIONS
    if not manifest["options"].get("quantized_model"):
        return None
    noted = manifest["quantized"]
    return f"{noted['method']} codes of {noted['title']} in groups of {noted['group_size']}"


# -- page ----------------------------------------------------------------------------------------------------


def document(report: Mapping[str, Any]) -> Document:
    """What report.html and report.md say, of the value of report.json."""
    sections = (
        quality.quality(report),
        speed.speed(report),
        *quality.answers(report),
        *speed.engines(report),
        *quality.curve(report),
        model.verification(report),
        model.origin(report),
        model.experts(report),
    )
    return Document(model.title(report), model.head(report), sections)


def first_screen(report: Mapping[str, Any]) -> str:
    """The head of report.html, as a page."""
    return html(Document(model.title(report), model.head(report), ()), {})


def _drawings(report: Mapping[str, Any]) -> dict[str, str]:
    """<svg> elements by name; one that has nothing to show is absent, and all are without matplotlib."""
    try:
        from nbl_export.report import plots
    except ImportError:  # a machine that only runs engines; the tables say the same
        return {}
    drawn = {}
    if report["rows"]:
        drawn["throughput"] = plots.throughput(report["rows"], report["ratios"])
    if report["curve"]:
        drawn["curve"] = plots.curve(
            report["curve"]["points"], len(report["replaced_layers"]), (report.get("exit") or {}).get("recent_tokens")
        )
    return drawn
