"""What commands print: tables of a run directory, a graph, a measurement, and this machine's engines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from nbl_export.records.paired import describe_ratio
from nbl_export.records.plan import describe_layers
from nbl_export.records.results import describe_background
from nbl_export.report import length, model, quality, speed
from nbl_export.report.outcome import describe_exit, outcome
from nbl_export.report.table import Column, Shown, Table, facts
from nbl_export.report.words import size, test

__all__ = [
    "checks_table",
    "compared_table",
    "describe_table",
    "doctor_table",
    "engines_table",
    "eval_table",
    "graph_table",
    "ir_table",
    "routes_table",
    "speed_table",
]

_LOGITS = {"last": "of the last token", "all": "of all tokens", None: "no output of that name"}


# -- a run directory, a graph, engines ------------------------------------------------------------------------------


def describe_table(found: dict[str, Any]) -> Shown:
    """A run directory, see `run.deployed.describe`."""
    logits = found["logits"]
    decoder = {name: "?" if value is None else value for name, value in found["decoder"].items()}
    replaced = found["replaced_layers"]
    layers = "not planned yet" if replaced is None else ", ".join(map(str, replaced)) or "none"
    head = facts(
        [
            ("model", found["model"]["name"]),
            (
                "decoder",
                f"{found['decoder']['architecture'] or 'unnamed'}, {decoder['num_layers']} layers, hidden size "
                f"{decoder['hidden_size']}, {decoder['num_heads']} query and {decoder['num_kv_heads']} key/value heads "
                f"of {decoder['head_dim']}",
            ),
            ("precision", ", ".join(filter(None, (found["precision"], found["codes"])))),
            ("logits", f"{_LOGITS[logits]}, in both decoders" if logits in ("last", "all") else "not built yet"),
            ("replaced layers", describe_exit(found) or layers),
            *(row for row in (outcome(found["result"]) if found["result"] else ()) if row[0] != "layers"),
            (
                "status",
                found["status"] + ("" if "report" in found["stages"] else "; not finished: give the command again"),
            ),
            ("stages", ", ".join(f"{n} {s:.1f} s" for n, s in found["stages"].items()) or "none finished"),
            ("command", found["command"]),
        ]
    )
    columns = ("decoder", *Column.numbers("layers with cache", "cache bytes a token", "size on disk"))
    rows = ((name, *_variant(variant)) for name, variant in found["variants"].items())
    graphs = Table.of(columns, rows, "Graphs")
    return (head, graphs, engines_table(found["engines"])) if found["engines"] else (head, graphs)


def _variant(variant: Mapping[str, Any] | None) -> tuple[Any, ...]:
    if variant is None:
        return "not built yet", "", ""
    return variant["cache_layers"], f"{variant['kv_cache_bytes_per_token']:,}", size(variant["model_bytes"])


def routes_table(found: list[dict[str, str]]) -> Shown:
    """`publish.convert.routes`: where a run can be served, and why not elsewhere."""

    def table(title: str, column: str, cell: str, *, possible: bool) -> Table:
        rows = [(f"{row['name']} ({row['title']})", row[cell]) for row in found if (not row["reason"]) is possible]
        return Table.of(("destination", column), rows or [("none", "")], title)

    return (
        table("Can be served by", "take", "take", possible=True),
        table("Cannot be served by", "because", "reason", possible=False),
    )


def engines_table(engines: dict[str, Any]) -> Table:
    """What the build stage made."""
    columns = ("engine", "made by", "precision", *Column.numbers("size", "built in", "caches of all slots"))
    return Table.of(
        columns,
        [
            (
                name,
                f"{made['engine']} {made['version']}",
                made["precision"],
                size(made["plan_bytes"]),
                f"{made['build_seconds']:.1f} s",
                size(made["cache_bytes"]),
            )
            for name, made in engines.items()
        ],
        "Engines",
    )


def graph_table(found: dict[str, Any]) -> Shown:
    """`graph.external_graph.describe_graph`: the decoder, and what can be done to each layer."""
    head = facts(
        [
            ("graph", f"{found['graph']} ({size(found['bytes'])} with its data)"),
            ("decoder", f"{found['num_layers']} layers, hidden size {found['hidden_size'] or 'unknown'}"),
            ("replaced", ", ".join(map(str, found["replaced_layers"])) or "no layer"),
            ("logits", _LOGITS[found["logits"]]),
        ]
    )
    layers = Table.of(("layers", "caches", "can become a map"), _attention(found), "Attention layers")
    return head, layers, _slow(found["findings"])


def ir_table(found: dict[str, Any]) -> Shown:
    """`graph.ir.findings.describe_ir`: the decoder, and what makes it slow."""
    head = facts(
        [
            ("graph", f"{found['graph']} ({size(found['bytes'])} with its constants)"),
            ("key/value states", found["states"]),
            ("logits", _LOGITS[found["logits"]]),
        ]
    )
    return head, _slow(found["findings"])


def _slow(findings: list[dict[str, Any]]) -> Table | str:
    """What slows the prefill of a decoder, a row each."""
    if not findings:
        return "Nothing found that slows prefill."
    columns = ("what", Column("nodes", "number"), "what to do")
    rows = ((finding["what"], finding["nodes"], finding["advice"]) for finding in findings)
    return Table.of(columns, rows, "Slow prefill")


def _attention(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for neighbours that can be rewritten alike."""
    for (taps, reason), group in groupby(found["layers"], key=lambda f: (tuple(f["taps"]), f["reason"])):
        rows = list(group)
        rewrite = f"no: {reason}" if reason else f"yes, of {' or '.join(taps)} input"
        yield describe_layers([row["layer"] for row in rows]), ", ".join(rows[0]["caches"]), rewrite


def doctor_table(found: dict[str, Any], machine: str, gpu: str) -> Shown:
    """`examine_engines` for people: what works here, what could be added, and lines about processor and GPU."""

    def engines(title: str, column: str, *, available: bool) -> Table:
        rows = [
            (f"{name} ({answer['title']})", answer["reason"])
            for name, answer in found.items()
            if answer["available"] is available
        ]
        return Table.of(("engine", column), rows or [("none", "")], title)

    works = engines("Works here", "with", available=True)
    return works, engines("Could be added", "needs", available=False), machine, gpu


# -- verification and measurements ----------------------------------------------------------------------------------


def checks_table(result: dict[str, Any]) -> Shown:
    """The verification ladder and the quality loss."""
    title = "Quality loss (in brackets 95% intervals over windows)"
    return (
        model.checks(result["checks"], "Verification"),
        *result["proof"],
        *result["warnings"],
        quality.losses(result["quality_loss"], title),
    )


def speed_table(result: dict[str, Any]) -> Shown:
    """The report's table of speeds, and whether other work ran beside."""
    where = result["bench"]["background"]
    said = [f"Speed was {describe_background(where)}."] if where["busy"] or where["gave_up"] else []
    return speed.speeds(result, "Speed"), *said


def eval_table(result: dict[str, Any]) -> Shown:
    """Benchmark figures of both decoders, and NBL minus original on the same items; then quality at length."""
    figures = (quality.benchmarks(result["table"], "Quality"),) if result["table"] else ()
    return *figures, *length.tables(result["length"]), *length.notes(result["length"])


def compared_table(value: Mapping[str, Any]) -> Shown:
    """Result of `run.compare.compare`: speed, ratio over the base, latency; memory stands in a decoder's first row."""
    ratios = {_key(r): r for r in value["ratios"]}
    over = (f"over {value['base']}", "interval") if ratios else ()
    numbers = ("tokens/s", "± sd", *over, "TTFT ms", "TPOT p50 / p95 / p99 ms", "peak memory", "on disk")
    rows = []
    seen = set()
    for row in value["rows"]:
        facts = value["variants"][row["variant"]] if row["variant"] not in seen else None
        seen.add(row["variant"])
        tpot = row["tpot_seconds"]
        rows.append(
            [
                row["variant"],
                test(row),
                f"{row['tokens_per_second_median']:.2f}",
                f"{row['tokens_per_second_stdev']:.2f}",
                *(_ratio_cells(ratios.get(_key(row))) if ratios else ()),
                None if row["ttft_seconds"] is None else f"{1000 * row['ttft_seconds']:.1f}",
                " / ".join(f"{1000 * s:.2f}" for s in tpot.values()) if tpot else None,
                facts and size(facts["peak_memory_bytes"]),
                facts and size(facts["model_bytes"]),
            ]
        )
    said = f"Speed was {describe_background(value['background'])}."
    return Table.of(("decoder", "test", *Column.numbers(*numbers)), rows), said


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "tokens", "depth", "variant"))


def _ratio_cells(ratio: Mapping[str, Any] | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return ratio["text"], f"{describe_ratio(ratio['low'])} to {describe_ratio(ratio['high'])}, {ratio['interval']}"
