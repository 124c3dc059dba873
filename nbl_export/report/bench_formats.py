"""The result of `run.compare.compare` as text: a table, Markdown, CSV, JSON, or llama-bench's columns.

llama-bench (llama.cpp, tools/llama-bench, markdown printer): model, size, params, backend, threads, test, t/s; sizes in
MiB or GiB and parameters in M or B with two digits, "pp512 @ d2048" behind a cache, t/s as mean ± standard deviation.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.files import replacing
from nbl_export.measure.instruments import spoken_background
from nbl_export.measure.paired import spoken_ratio, spoken_test
from nbl_export.report.table import Column, Table
from nbl_export.trust.terminal import Console, visible

__all__ = ["FORMATS", "check_output", "format_of", "render", "write"]

FORMATS = ("table", "md", "csv", "json", "llama-bench")
_ENDINGS = {".md": "md", ".csv": "csv", ".json": "json"}


def format_of(asked: str | None, output: Path | None, *, as_json: bool = False) -> str:
    """The format that is asked for, by name or by the ending of the file; a table otherwise.

    Raises:
        UsageError: there is no such format, or two are asked for.
    """
    if asked is not None and asked not in FORMATS:
        raise UsageError(f"--format is one of {', '.join(FORMATS)}, not {asked!r}")
    if as_json and asked not in (None, "json"):
        raise UsageError(f"--json and --format {asked} are two formats; leave one out")
    if as_json:
        return "json"
    return asked or _ENDINGS.get(output.suffix.lower() if output else "", "table")


def check_output(output: Path | None) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        NblError: it is a directory, or is to lie in none.
    """
    if output is None:
        return
    if output.is_dir():
        raise NblError(f"--output {output} is a directory; name a file")
    if not output.absolute().parent.is_dir():
        raise NblError(f"--output {output}: there is no directory {output.absolute().parent}; make it first")


def write(text: str, output: Path) -> None:
    """Write the text, all of it or nothing."""
    with replacing(output) as stream:
        stream.write(text.encode())


def render(value: Mapping[str, Any], form: str, width: int | None = None) -> str:
    """The text in one of `FORMATS`, ending in a line break. width: columns of a table, None is the terminal's."""
    if form == "json":
        return json.dumps(value, indent=1) + "\n"
    if form == "csv":
        return visible(_figures(value).csv())
    if form == "llama-bench":
        return visible(_llama_bench(value).markdown(aligned=True)) + "\n"
    table, said = _compared(value), f"Speed was {spoken_background(value['background'])}.\n"
    if form == "md":
        return f"{visible(table.markdown())}\n\n{said}"
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return f"{stream.getvalue()}\n{said}"


def _compared(value: Mapping[str, Any]) -> Table:
    """For people: speed, ratio over the base, latency; memory stands in a decoder's first row."""
    swept = len({row["threads"] for row in value["rows"]}) > 1
    ratios = {_key(r): r for r in value["ratios"]}
    over = (f"over {value['base']}", "interval") if ratios else ()
    numbers = ("tokens/s", "± sd", *over, "TTFT ms", "TPOT p50 / p95 / p99 ms", "peak memory", "on disk")
    rows, seen = [], set()
    for row in value["rows"]:
        facts = value["variants"][row["variant"]] if row["variant"] not in seen else None
        seen.add(row["variant"])
        tpot = row["tpot_seconds"]
        rows.append([
            row["variant"],
            spoken_test(row, swept=swept),
            f"{row['tokens_per_second_median']:.2f}",
            f"{row['tokens_per_second_stdev']:.2f}",
            *(_ratio_cells(ratios.get(_key(row))) if ratios else ()),
            None if row["ttft_seconds"] is None else f"{1000 * row['ttft_seconds']:.1f}",
            " / ".join(f"{1000 * s:.2f}" for s in tpot.values()) if tpot else None,
            facts and _size(facts["peak_memory_bytes"]),
            facts and _size(sum(facts["disk_bytes"].values())),
        ])  # fmt: skip
    return Table.of(("decoder", "test", *Column.numbers(*numbers)), rows)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "tokens", "depth", "batch", "threads", "variant"))


def _ratio_cells(ratio: Mapping[str, Any] | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return ratio["text"], f"{spoken_ratio(ratio['low'])} to {spoken_ratio(ratio['high'])}, {ratio['interval']}"


def _figures(value: Mapping[str, Any]) -> Table:
    """Raw numbers, a line for each row."""
    ratios = {_key(r): r for r in value["ratios"]}
    lines = [_line(value, row, ratios.get(_key(row), {})) for row in value["rows"]]
    return Table.of(lines[0], [line.values() for line in lines])


def _line(value: Mapping[str, Any], row: Mapping[str, Any], ratio: Mapping[str, Any]) -> dict[str, Any]:
    facts, tpot = value["variants"][row["variant"]], row["tpot_seconds"] or {}
    return {
        "decoder": row["variant"],
        **{name: row[name] for name in ("test", "kind", "tokens", "depth", "batch", "threads")},
        **{name: row[f"tokens_per_second_{name}"] for name in ("median", "mean", "stdev")},
        "base": value["base"],
        **{name: ratio.get(name) for name in ("ratio", "low", "high", "confidence", "loads", "verdict")},
        "ttft_seconds": row["ttft_seconds"],
        **{f"tpot_{name}_seconds": tpot.get(name) for name in ("p50", "p95", "p99")},
        "joules_per_token": row["joules_per_token"],
        **{name: facts[name] for name in ("peak_memory_bytes", "steady_memory_bytes", "load_seconds")},
        "model_bytes": facts["model_bytes"],
        "disk_bytes": sum(facts["disk_bytes"].values()),
        **{name: facts[name] for name in ("kv_cache_bytes_per_token", "parameters", "engine", "provider")},
        "cpu": value["machine"]["cpu"],
        "others_cores": value["background"]["others"],
        "busy": value["background"]["busy"],
    }


def _llama_bench(value: Mapping[str, Any]) -> Table:
    batched = any(row["batch"] > 1 for row in value["rows"])
    columns = ("model", *Column.numbers("size", "params"), "backend",
               *Column.numbers("threads", *(["batch"] if batched else []), "test", "t/s"))  # fmt: skip
    rows = []
    for row in value["rows"]:
        facts = value["variants"][row["variant"]]
        rows.append([
            row["variant"],
            _size(facts["model_bytes"]),
            _parameters(facts["parameters"]),
            f"{facts['engine'].upper()} {facts['provider'].upper()}",
            row["threads"],
            *([row["batch"]] if batched else []),
            row["test"] + (f" @ d{row['depth']}" if row["depth"] else ""),
            f"{row['tokens_per_second_mean']:.2f} ± {row['tokens_per_second_stdev']:.2f}",
        ])  # fmt: skip
    return Table.of(columns, rows)


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def _parameters(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"
