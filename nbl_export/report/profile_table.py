"""Tables of a profile and of a projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

from nbl_export.measure.rows import spoken_ratio

__all__ = ["profile_table", "table"]

_RARE = 0.001  # share of time below which operators share one line of the table


_PHASES = ("prefill", "decode")


# -- for people ------------------------------------------------------------------------------------------


def profile_table(found: Mapping[str, Any]) -> Group:
    """`profile` for people: decoders side by side by operator, then the dearest nodes of each."""
    titles = {"prefill": f"Prefill of {found['prompt_tokens']} tokens", "decode": "One decode step behind it"}
    tables: list[Table] = []
    for phase in _PHASES:
        tables.append(_operators(titles[phase], {name: d[phase] for name, d in found["decoders"].items()}))
    for name, decoder in found["decoders"].items():
        for phase in _PHASES:
            table = Table("node", "operator", "ms", "share", title=f"Dearest nodes: {name}, {phase}")
            for node in decoder[phase]["nodes"]:
                table.add_row(node["node"], node["operator"], f"{node['ms']:.2f}", f"{100 * node['share']:.1f}%")
            tables.append(table)
    return Group(*tables)


def _operators(title: str, of_decoders: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("operator", title=title)
    for name in of_decoders:
        for column in (f"{name}: calls", "ms", "share"):
            table.add_column(column, justify="right")
    rows = {name: {o["operator"]: o for o in d["operators"]} for name, d in of_decoders.items()}
    spent = {o: max(r.get(o, {"ms": 0.0})["ms"] for r in rows.values()) for own in rows.values() for o in own}
    rare = {o for o in spent if all(own.get(o, {"share": 0.0})["share"] < _RARE for own in rows.values())}
    for operator in sorted(spent.keys() - rare, key=lambda o: -spent[o]):
        cells: list[str] = []
        for own in rows.values():
            o = own.get(operator)
            cells += ["", "", ""] if o is None else [f"{o['calls']:g}", f"{o['ms']:.2f}", f"{100 * o['share']:.1f}%"]
        table.add_row(operator, *cells)
    if rare:
        left = [sum(own[o]["ms"] for o in rare if o in own) for own in rows.values()]
        table.add_row(f"{len(rare)} others", *(cell for ms in left for cell in ("", f"{ms:.2f}", "")))
    table.add_section()
    kernels = [cell for d in of_decoders.values() for cell in ("", f"{d['kernels_ms']:.2f}", "")]
    whole = [cell for d in of_decoders.values() for cell in (f"{d['runs']} runs", f"{d['run_ms']:.2f}", "")]
    table.add_row("all kernels", *kernels)
    table.add_row("a run, median", *whole)
    return table


def table(found: list[dict[str, Any]]) -> Table:
    """For people. At most: the limit; expected: the limit times the efficiency that was measured elsewhere."""
    first = found[0]
    title = f"{first['shape']} in {first['precision']}, {len(first['replaced_layers'])} layers replaced: a projection"
    made = Table("test", "bound by", "original, at most", "NBL, at most", "ratio", title=title)
    expected = "expected_tokens_per_second" in first
    if expected:
        made.add_column("original, expected")
        made.add_column("NBL, expected")
    for row in found:
        what = f"prefill of {row['tokens']}" if row["phase"] == "prefill" else "decode"
        cells = [f"{what} after {row['depth']}" if row["depth"] else what, row["bound"]]
        cells += [_speed(row["limit_tokens_per_second"][name]) for name in ("original", "nbl")]
        cells.append(spoken_ratio(row["ratio"]))
        cells += [_speed(row["expected_tokens_per_second"][name]) for name in ("original", "nbl") if expected]
        made.add_row(*cells)
    return made


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f} tok/s" if tokens_per_second >= 99.5 else f"{tokens_per_second:.1f} tok/s"
