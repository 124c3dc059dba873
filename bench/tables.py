"""Writes the README's tables of measurements from the raw results.

    python bench/tables.py            every table between <!-- NAME --> and <!-- /NAME --> anew, and the plot
    python bench/tables.py --check    only say which rows would change, and end with 1

A table says which figures of which file it shows; what stands around it in the README is prose. The plot is that of
the report, which takes its colours from the page where there is one; its bytes depend on matplotlib's version.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables_quality as quality
import tables_speed as speed

ROOT = Path(__file__).resolve().parent.parent
# Marker in the README -> what makes its rows of the raw results.
TABLES: Mapping[str, Callable[[Callable[[str], Any]], list[Sequence[str]]]] = {
    "demo": speed.demo,
    "int4": speed.int4,
    "precisions": speed.precisions,
    "peers": speed.peers,
    "errors": speed.errors,
    "parity": speed.parity,
    "ladder": quality.ladder,
    "choices": quality.choices,
    "tails": quality.tails,
    "tasks": quality.tasks,
    "graphs": quality.graphs,
    "distilled": quality.distilled,
}


def result(name: str) -> Any:
    """The raw results of that name."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(rows: list[Sequence[str]]) -> str:
    """A table whose first row is its head and whose second says how columns are set: "l" or "r"."""
    head, columns, *body = rows
    rule = ["---:" if column == "r" else "---" for column in columns]
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *body)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def written(text: str) -> str:
    """The text with every table made anew.

    Raises:
        KeyError: a marker names no table. ValueError: a table has no place, or more than one.
    """
    for name in TABLES:
        if text.count(f"<!-- {name} -->\n") != 1 or text.count(f"\n<!-- /{name} -->") != 1:
            raise ValueError(f"README.md has no single place for {name}")
    return re.sub(
        r"<!-- ([\w-]+) -->\n.*?\n<!-- /\1 -->",
        lambda found: f"<!-- {found[1]} -->\n{markdown(TABLES[found[1]](result))}\n<!-- /{found[1]} -->",
        text,
        flags=re.DOTALL,
    )


def plot() -> None:
    """Write the plot of the sweep, a file of its own on white."""
    from nbl_export import plots

    sweep = result("sweep-smollm2")
    drawn = plots.tradeoff(sweep["points"], sweep["recommended"])
    alone = drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ', 1)
    (ROOT / "bench" / "results" / "sweep-smollm2.svg").write_text(alone + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = written(before)
    if parser.parse_args().check:
        old, new = before.splitlines(), after.splitlines()
        changed = [f"- {a}\n+ {b}" for a, b in zip(old, new, strict=False) if a != b]
        sys.exit("\n".join(changed[:20]) if before != after else 0)
    readme.write_text(after, encoding="utf-8")
    plot()


if __name__ == "__main__":
    main()
