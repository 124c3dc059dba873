"""What is in a run directory and on this machine, as facts and as tables for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from nbl_export import background
from nbl_export.artifacts import RunDirectory
from nbl_export.engines import ENGINES, load_engine
from nbl_export.engines.providers import PROVIDERS
from nbl_export.price import spoken_price
from nbl_export.public_facts import codes_of
from nbl_export.records import DecoderSpec
from nbl_export.speed import spoken_ratio, spoken_test

__all__ = [
    "describe",
    "describe_table",
    "doctor_table",
    "engines_table",
    "eval_table",
    "examine_engines",
    "rungs_table",
    "scores_table",
    "speed_table",
]


def describe(directory: Path) -> dict[str, Any]:
    """Plan, stages, sizes and caches of a run directory.

    Raises:
        NblError: it is none.
    """
    facts = RunDirectory.existing(directory).manifest
    spec = DecoderSpec(**facts["decoder"])
    options = facts["options"]
    capabilities = load_engine(options["engine"], options.get("provider", "cpu")).CAPABILITIES
    itemsize = capabilities.cache_itemsize(options["precision"])
    kept = spec.num_layers - len(facts.get("replaced_layers", ()))
    return {
        "model": facts["model"],
        "decoder": facts["decoder"],
        "status": facts["status"],
        "precision": facts["options"]["precision"],
        "codes": codes_of(facts),
        "logits": facts.get("logits"),
        "replaced_layers": facts.get("replaced_layers"),
        "tap": facts.get("tap"),
        "token_table": facts.get("token_table"),
        "stages": {name: record["seconds"] for name, record in facts["stages"].items()},
        "variants": {
            "original": _variant(directory / "original", spec, spec.num_layers, itemsize),
            "nbl": _variant(directory / "model", spec, kept, itemsize),
        },
        "engines": facts.get("engines", {}),
        "files": {n: _size(directory / n) for n in ("moments.safetensors", "maps.safetensors", "checkpoint")},
        "scores": facts.get("scores", []),
        "command": facts["command"],
    }


_LOGITS = {"last": "of the last token, in both decoders", "all": "of all tokens, in both decoders"}


def _variant(directory: Path, spec: DecoderSpec, kept: int, itemsize: int) -> dict[str, Any] | None:
    if not directory.is_dir():
        return None
    return {
        "path": str(directory),
        "cache_layers": kept,
        "kv_cache_bytes_per_token": spec.cache_bytes_per_token(kept, itemsize),
        "model_bytes": _size(directory),
    }


def _size(path: Path) -> int | None:
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else None


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


def rungs_table(result: dict[str, Any]) -> Group:
    """The verification ladder and the price."""
    ladder = Table("rung", "subject", "metric", "seen", "allowed", "", title="Verification")
    for r in result["rungs"]:
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
    title = "Price (not gated; in brackets 95% intervals over windows)"
    cost = Table(
        "text", "tokens", "windows", "perplexity", "with NBL", "increase", "KL", "top-1 agreement", title=title
    )
    for p in result["price"]:
        both = (p[name] for name in ("perplexity_original", "perplexity_nbl"))
        perplexities = ("not finite" if value is None else f"{value:.3g}" for value in both)
        cost.add_row(p["text"], f"{p['tokens']:,}", str(p["windows"]), *perplexities, *spoken_price(p).values())
    return Group(ladder, *result["proof"], cost)


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


def examine_engines() -> dict[str, Any]:
    """Availability of every engine and provider, with the reason."""
    engines = {name: (load_engine(name), load_engine(name).probe()) for name in ENGINES}
    for flag in PROVIDERS:
        engine = load_engine("ort", flag)
        engines[f"ort --provider {flag}"] = engine, engine.probe_run()
    return {
        name: {"title": engine.CAPABILITIES.title, "available": answer.available, "reason": answer.reason}
        for name, (engine, answer) in engines.items()
    }


def doctor_table(found: dict[str, Any]) -> Table:
    """`examine_engines` for people."""
    table = Table("engine", "", "", title="Engines on this machine")
    for name, answer in found.items():
        table.add_row(f"{name} ({answer['title']})", "works" if answer["available"] else "no", answer["reason"])
    return table
