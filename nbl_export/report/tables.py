"""What is in a run directory and on this machine, as facts and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from nbl_export.measure import background
from nbl_export.measure.rows import spoken_ratio, spoken_test
from nbl_export.report.sections import lossless
from nbl_export.text.window_intervals import spoken_interval, spoken_price

__all__ = [
    "METHOD_NAMES",
    "describe_table",
    "doctor_table",
    "engines_table",
    "eval_table",
    "ladder_table",
    "lossless_table",
    "rungs_table",
    "scores_table",
    "speed_table",
    "sweep_table",
]

METHOD_NAMES = {"nbl": "NBL", "drop": "dropped", "distilled": "distilled"}  # of a sweep's points
_LOGITS = {"last": "of the last token, in both decoders", "all": "of all tokens, in both decoders"}


def describe_table(facts: dict[str, Any]) -> Group:
    """`describe` for people."""
    decoder = facts["decoder"]
    head = Table(show_header=False, box=None)
    for name, value in (
        ("model", facts["model"]["name"]),
        ("decoder", f"{decoder['architecture']}, {decoder['num_layers']} layers, hidden size {decoder['hidden_size']}, "
         f"{decoder['num_heads']} query and {decoder['num_kv_heads']} key/value heads of {decoder['head_dim']}"),
        ("precision", ", ".join(filter(None, (facts["precision"], facts["codes"])))),
        ("logits", _LOGITS.get(facts["logits"], "not built yet")),
        ("replaced layers", _layers(facts["replaced_layers"])),
        *_table_row(facts["token_table"]),
        ("status", facts["status"]),
        ("stages", ", ".join(f"{n} {s:.1f} s" for n, s in facts["stages"].items()) or "none finished"),
        ("command", facts["command"]),
    ):  # fmt: skip
        head.add_row(name, str(value))
    table = Table("decoder", "layers with cache", "cache bytes a token", "size on disk", title="Graphs")
    for name, variant in facts["variants"].items():
        if variant is None:
            table.add_row(name, "not built yet", "", "")
        else:
            table.add_row(
                name,
                str(variant["cache_layers"]),
                f"{variant['kv_cache_bytes_per_token']:,}",
                f"{variant['model_bytes'] / 2**20:,.1f} MiB",
            )
    return Group(head, table, engines_table(facts["engines"])) if facts["engines"] else Group(head, table)


def engines_table(engines: dict[str, Any]) -> Table:
    """What the build stage made."""
    table = Table("engine", "made by", "precision", "size", "built in", "caches of all slots", title="Engines")
    for name, record in engines.items():
        table.add_row(
            name,
            f"{record['engine']} {record['version']}",
            record["precision"],
            f"{record['plan_bytes'] / 2**20:,.1f} MiB",
            f"{record['build_seconds']:.1f} s",
            f"{record['cache_bytes'] / 2**20:,.1f} MiB",
        )
    return table


def _table_row(table: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not table:
        return []
    return [("looked up", f"{_layers(table['layers'])}: a table of tokens, {table['bytes'] / 2**20:,.1f} MiB")]


def _layers(replaced: list[int] | None) -> str:
    if replaced is None:
        return "not planned yet"
    return ", ".join(map(str, replaced)) or "none"


def scores_table(manifest: dict[str, Any]) -> Table:
    """Per-layer scores, replaced layers marked."""
    table = Table("layer", "CCA bound", "NMSE", "relative error", "", title="Layers, smallest bound first")
    replaced = set(manifest["replaced_layers"])
    for score in sorted(manifest["scores"], key=lambda s: (s["bound"], s["layer"])):
        mark = "replaced" if score["layer"] in replaced else ""
        table.add_row(
            str(score["layer"]),
            f"{score['bound']:.3f}",
            f"{score['nmse']:.4f}",
            f"{score['relative_error']:.5f}",
            mark,
        )
    return table


def ladder_table(rungs: list[dict[str, Any]], title: str) -> Table:
    """What each rung has seen, and what was allowed."""
    ladder = Table("rung", "subject", "metric", "seen", "allowed", "", title=title)
    for r in rungs:
        gated = isinstance(r["tolerance"], float) and r["metric"].find("difference") >= 0
        seen = (
            "not finite"
            if r["value"] is None
            else f"{r['value']:.3g}"
            if gated or "margin" in r["metric"]
            else r["detail"]
        )
        allowed = f"{r['tolerance']:.3g}" if gated or "margin" in r["metric"] else ""
        ladder.add_row(r["rung"], r["subject"], r["metric"], seen, allowed, "ok" if r["passed"] else "FAILED")
    return ladder


def rungs_table(result: dict[str, Any]) -> Group:
    """The verification ladder and the quality loss."""
    title = "Quality loss (not gated; in brackets 95% intervals over windows)"
    cost = Table(
        "text", "tokens", "windows", "perplexity", "with NBL", "increase", "KL", "top-1 agreement", title=title
    )
    for p in result["price"]:
        both = (p[name] for name in ("perplexity_original", "perplexity_nbl"))
        perplexities = ("not finite" if value is None else f"{value:.3g}" for value in both)
        cost.add_row(p["text"], f"{p['tokens']:,}", str(p["windows"]), *perplexities, *spoken_price(p).values())
    return Group(ladder_table(result["rungs"], "Verification"), *result["proof"], cost)


def speed_table(result: dict[str, Any]) -> Group:
    """Benchmark rows in llama-bench's columns, with latency; ratios with their intervals."""
    swept = len({row["threads"] for row in result["rows"]}) > 1
    table = Table("test", "variant", "tokens/s", "± stdev", "TTFT ms", "TPOT p50 ms", "p95", "p99", title="Speed")
    for row in result["rows"]:
        tpot = row["tpot_seconds"] or {}
        seconds = (row["ttft_seconds"], *(tpot.get(q) for q in ("p50", "p95", "p99")))
        table.add_row(
            spoken_test(row, swept=swept),
            row["variant"],
            f"{row['tokens_per_second_median']:.2f}",
            f"{row['tokens_per_second_stdev']:.2f}",
            *("" if s is None else f"{1000 * s:.2f}" for s in seconds),
        )
    paired = Table("test", "variant", "over", "ratio", "interval", "", title="Paired ratios of tokens/s")
    for r in result["ratios"]:
        interval = f"{spoken_ratio(r['low'])} to {spoken_ratio(r['high'])}, {r['interval']}"
        ratio = spoken_ratio(r["ratio"])
        paired.add_row(spoken_test(r, swept=swept), r["variant"], r["base"], ratio, interval, r["verdict"])
    where = result["bench"]["background"]
    said = [f"Speed was {background.spoken(where)}."] if where["busy"] or where["gave_up"] else []
    return Group(table, *([paired] if result["ratios"] else []), *said)


def eval_table(result: dict[str, Any]) -> Table:
    """Benchmark figures of every variant, and NBL minus original on the same items."""
    table = Table("task", "metric", "items", "variant", "value", "± error", "difference", "± error", title="Quality")
    for row in result["table"]:
        against = {d["new"]: d for d in row["differences"]}
        for variant, found in row["figures"].items():
            paired = against.get(variant, {})
            numbers = (found["value"], found["stderr"], paired.get("value"), paired.get("stderr"))
            shown = ("" if n is None else f"{n:.4g}" for n in numbers)
            table.add_row(row["task"], row["metric"], str(row["items"]), variant, *shown)
    return table


def lossless_table(found: Mapping[str, Any]) -> Table:
    """The figures of lossless.json for people."""
    figures = lossless.table(found)
    table = Table(*(column.title for column in figures.columns))
    for row in figures.rows:
        table.add_row(*(cell.text for cell in row))
    return table


def doctor_table(found: dict[str, Any], gpu: str) -> Table:
    """`examine_engines` for people, over a line about the GPU."""
    table = Table("engine", "", "", title="Engines on this machine", caption=gpu)
    for name, answer in found.items():
        table.add_row(f"{name} ({answer['title']})", "works" if answer["available"] else "no", answer["reason"])
    return table


def sweep_table(sweep: Mapping[str, Any]) -> Table:
    """`measure` for people."""
    title = f"Quality against modelled speed, layers in the order {', '.join(map(str, sweep['order']))}"
    table = Table("", "layers", "prefill", "tail-pruned", "decode", title=title)
    for text in sweep["texts"]:
        table.add_column(f"perplexity {text}", justify="right")
        table.add_column("KL", justify="right")
    table.add_column("")
    for p in sweep["points"]:
        advice = sweep["recommended"]
        chosen = advice is not None and (p["method"], p["layers"]) == (advice["method"], advice["layers"])
        speeds = [f"x{p[name]:.2f}" for name in ("prefill", "prefill_tail_pruned", "decode")]
        prices = [cell for price in p["prices"] for cell in _cells(price)]
        table.add_row(_name(p), str(p["layers"]), *speeds, *prices, "recommended" if chosen else "")
    return table


def _name(point: Mapping[str, Any]) -> str:
    together = point.get("distilled_for", point["layers"])
    return METHOD_NAMES[point["method"]] + (f" for {together}" if together != point["layers"] else "")


def _cells(price: Mapping[str, Any]) -> tuple[str, str]:
    if price["perplexity"] is None or price["increase"] is None:
        return "not finite", "–"
    rise = spoken_interval(price["increase"], price["increase_interval"], percent=True, sign=True)
    return f"{price['perplexity']:.3g}, {rise}", spoken_interval(price["kl"], price["kl_interval"])
