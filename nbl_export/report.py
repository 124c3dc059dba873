"""What the other stages found -> one page for people, the same as Markdown, the same as JSON.

    nbl.json, verify.json, bench.json ─► summarize ─► report.json ─► report.html (report.html.jinja) ─► report.md

The template says what stands on the page; the Markdown is that page without its drawings, so they cannot disagree.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from nbl_export import background, plots
from nbl_export.artifacts import write_json
from nbl_export.paired import FEWEST_LOADS
from nbl_export.price import spoken_price
from nbl_export.public_facts import codes_of
from nbl_export.records import spoken_layers
from nbl_export.speed import read_timings, speed_ratios, speed_rows, spoken_ratio, spoken_test
from nbl_export.window_intervals import spoken_interval

__all__ = ["render", "summarize"]

_COPIED = ("model", "options", "command", "versions", "calibration", "num_layers", "replaced_layers", "tap", "select",
           "method", "logits", "token_table")  # fmt: skip
_PER_VARIANT = ("peak_memory_bytes", "steady_memory_bytes", "kv_cache_bytes", "kv_cache_bytes_per_token",
                "model_bytes", "disk_bytes", "load_seconds")  # fmt: skip


def render(
    manifest: dict[str, Any], verify: dict[str, Any], bench: dict[str, Any] | None, out: Path,
    sweep: dict[str, Any] | None = None, quality: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write report.html, report.md and report.json into `out`; the same input gives the same bytes.

    Args:
        manifest: nbl.json.
        verify: verify.json.
        bench: bench.json, or None where speed was not measured.
        out: an existing directory.
        sweep: sweep.json, or None where none was made.
        quality: eval.json, or None where no benchmark was run.

    Returns:
        The value of report.json.

    Raises:
        CorruptError: the two variants of a test have different numbers of rounds.
    """
    report = {**summarize(manifest, verify, bench, quality), "sweep": sweep}
    page = _html(report)
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "report.md").write_text(_markdown(page), encoding="utf-8")
    write_json(out / "report.json", report)
    return report


# -- values --------------------------------------------------------------------------------------------------


def summarize(
    manifest: dict[str, Any],
    verify: dict[str, Any],
    bench: dict[str, Any] | None,
    quality: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The value of report.json, a function of its inputs; figures that are not finite become None."""
    manifest, verify, measured = _finite(manifest), _finite(verify), bench or {}
    timings = read_timings(measured)
    rungs, variants = verify["rungs"], measured.get("variants", {})
    return {
        "schema": 1,
        "verified": bool(verify["passed"] and all(r["passed"] for r in rungs) and manifest["status"] != "failed"),
        **{name: manifest.get(name) for name in _COPIED},
        "scores": manifest.get("scores", []),
        "stage_seconds": {name: stage["seconds"] for name, stage in manifest.get("stages", {}).items()},
        "precision": verify["precision"],
        "codes": codes_of(manifest),
        "rungs": rungs,
        "proof": verify.get("proof", []),
        "largest_logit_difference": _largest_logit_difference(rungs),
        "price": verify.get("price", []),
        "texts": verify.get("texts", []),
        "fit": manifest.get("fit", {}).get("kind"),
        "without_original": manifest.get("fit", {}).get("kind") == "given",
        "quality": {k: quality[k] for k in ("lm_eval", "table", "agreement")} if quality else None,
        "price_warning": verify.get("price_warning"),
        "cache_bytes_per_token": verify["cache_bytes_per_token"],
        "engines": manifest.get("engines"),
        "rows": speed_rows(timings),
        "ratios": speed_ratios(timings),
        "variants": variants,
        **{name: {v: facts.get(name) for v, facts in variants.items()} for name in _PER_VARIANT},
        "machine": measured.get("machine"),
        "bench": {k: v for k, v in measured.items() if k not in ("machine", "timings", "variants")} if bench else None,
    }


def _largest_logit_difference(rungs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The comparison with the reference (rungs b and c) that is largest; one that is not finite is larger than any."""
    logits = [r for r in rungs if r["rung"] in ("b", "c") and "logit" in r["metric"].lower()]
    return max(logits, key=lambda r: math.inf if r["value"] is None else r["value"]) if logits else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- page ----------------------------------------------------------------------------------------------------


def _html(report: dict[str, Any]) -> str:
    source = importlib.resources.files("nbl_export").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "number": _number,
        "price": spoken_price,
        "risen": lambda p: spoken_interval(p["increase"], p["increase_interval"], percent=True, sign=True),
        "interval": spoken_interval,
        "times": spoken_ratio,
        "background": background.spoken,
        "test": spoken_test,
        "milliseconds": lambda seconds: "–" if seconds is None else f"{_number(1000 * seconds)} ms",
        "size": _size,
        "duration": _duration,
        "change": _change,
        "runs": spoken_layers,
        "figure": lambda f: f"{_number(f['value'])}{_plus_minus(f['stderr'])}" if f else "–",
        "signed": lambda f: f"{_signed(f['value'])}{_plus_minus(f['stderr'])}" if f else "–",
        "percent": lambda share: "–" if share is None else f"{_number(100 * share)}%",
    }
    return environment.from_string(source).render(report=report, figures=_figures(report), fewest=FEWEST_LOADS)


def _figures(report: dict[str, Any]) -> dict[str, Markup]:
    """The drawings by name; one that has nothing to show is absent."""
    drawn = {}
    rows, ratios = _main(report["rows"]), _main(report["ratios"])
    if rows:
        drawn["throughput"] = plots.throughput(rows, ratios)
    if len({r["depth"] for r in ratios}) > 1:
        drawn["depths"] = plots.depths(ratios)
    if report["sweep"]:
        drawn["tradeoff"] = plots.tradeoff(report["sweep"]["points"], report["sweep"]["recommended"])
    for key, label in (("bound", "CCA bound"), ("relative_error", "relative error")):
        values = [(s["layer"], s[key]) for s in report["scores"] if s[key] is not None]
        if values:
            drawn[key] = plots.layers(key, values, report["replaced_layers"], label)
    return {name: Markup(svg) for name, svg in drawn.items()}


def _main(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a sweep the first number of threads and the first batch, which the drawings are of."""
    return [r for r in rows if (r["threads"], r["batch"]) == (rows[0]["threads"], rows[0]["batch"])]


def _number(value: float | None, missing: str = "–") -> str:
    """Three significant digits; whole from a thousand on."""
    if value is None:
        return missing
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == 0 else f"{value:#.3g}".rstrip(".")


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {_number(stderr)}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{_number(abs(value))}"


def _size(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    if count is None:
        return "–"
    power = min(3, int(math.log2(max(count, 1))) // 10)
    return f"{_number(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _duration(seconds: float | None) -> str:
    if seconds is None or seconds < 60:
        return "–" if seconds is None else f"{_number(seconds)} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _change(before: float | None, after: float | None) -> str:
    """Percent from one to the other, with its sign."""
    return "–" if not before or after is None else f"{100 * (after / before - 1):+.1f}%".replace("-", "−")


# -- Markdown ------------------------------------------------------------------------------------------------


def _markdown(page: str) -> str:
    """The page as GitHub-flavoured Markdown."""
    reader = _Reader()
    reader.feed(page)
    return "\n".join(reader.lines).strip() + "\n"


_BLOCKS = {"h1": "# ", "h2": "## ", "h3": "### ", "summary": "### ", "p": "", "li": "- "}
_MARKS = {"strong": "**", "small": " · "}


class _Reader(HTMLParser):
    """Collects headings, paragraphs, items, tables and code; text anywhere else belongs to drawings and decoration."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._text: list[str] = []
        self._cells: list[str] = []
        self._rule: list[str] = []
        self._is_code = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _MARKS:
            self._text.append(_MARKS[tag])
        elif tag in _BLOCKS or tag in ("th", "td", "pre"):
            self._text, self._is_code = [], tag == "pre"
            self._rule += ["---:" if ("class", "n") in attrs else "---"] if tag == "th" else []
        elif tag == "table":
            self.lines.append("")
            self._rule = []

    def handle_data(self, data: str) -> None:
        self._text.append(data if self._is_code else re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", data))

    def handle_endtag(self, tag: str) -> None:
        text = " ".join("".join(self._text).split())
        if tag == "strong":
            self._text.append("**")
        elif tag == "pre":
            self.lines += ["", *("    " + line for line in "".join(self._text).splitlines())]
        elif tag in _BLOCKS:
            self.lines += ["", _BLOCKS[tag] + text]
        elif tag in ("th", "td"):
            self._cells.append(text)
        elif tag == "tr":
            self.lines.append(f"| {' | '.join(self._cells)} |")
            self._cells = []
        elif tag == "thead":
            self.lines.append(f"| {' | '.join(self._rule)} |")
