"""Writes the tables of README.md, docs/ and bench/EXPERIMENTS.md from the raw results in bench/results.

    python bench/tables.py            write every table between <!-- NAME --> and <!-- /NAME -->
    python bench/tables.py --check    only print the rows that would change; exit status 1 if there are any

A table computes its figures from the samples and windows of a raw result, by the package's own statistics. Raw results
that have kept none are named in bench/README.md. The text around the tables is written by hand. A figure in it is the
text of a link to the section that has its table, and --check looks for it there:
[×1.36](docs/serving.md#predicted-kv-in-vllm).
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables_exits as exits
import tables_models as models
import tables_proof as proof
import tables_quality as quality
import tables_second as second
import tables_serving as serving
import tables_speed as speed

ROOT = Path(__file__).resolve().parent.parent
Table = Callable[[Callable[[str], Any]], list[Sequence[str]]]
# Marker in one of the pages -> the function that makes the table's rows from the raw results.
TABLES: Mapping[str, Table] = {
    "headline": speed.headline,
    "headline-losses": speed.headline_losses,
    "model-qwen": models.qwen,
    "model-smollm2": models.smollm2,
    "seen": models.seen,
    "engines": models.engines,
    "exchange": speed.exchange,
    "job-times": speed.job_times,
    "search": speed.search,
    "int4-methods": speed.int4_methods,
    "choices": quality.choices,
    "exit-tasks": quality.exit_tasks,
    "ranks": quality.ranks,
    "halves": quality.halves,
    "tasks": quality.tasks,
    "architectures": proof.architectures,
    "runtimes": proof.runtimes,
    "second": quality.second,
    "second-tasks": quality.second_tasks,
    "vllm": serving.vllm,
    "vllm-exit": serving.vllm_exit,
    "vllm-load": serving.vllm_load,
    "llama-cpp": serving.llama_cpp,
    "first-token": serving.first_token,
    "exit-shapes": serving.exit_shapes,
    "rtx-engines": serving.rtx_engines,
    "ngram": serving.ngram,
    "shapes": second.shapes,
    "limited": second.limited,
    "intervals": speed.intervals,
    "coverage": speed.coverage,
    "looks-level": speed.looks_level,
    "looks-power": speed.looks_power,
    "length": quality.length,
    "continuing": exits.continuing,
    "step-rows": exits.step_rows,
    "equal-work": exits.equal_work,
    "equal-work-ranks": exits.equal_work_ranks,
}


def result(name: str) -> Any:
    """The raw results of this name."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def markdown(rows: list[Sequence[str]]) -> str:
    """A Markdown table. The first row is the head; the second gives the side of each column, "l" or "r"."""
    head, columns, *body = rows
    rule = ["---:" if column == "r" else "---" for column in columns]
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (head, *body)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def pages() -> dict[Path, str]:
    """README.md, EXPERIMENTS.md and the pages of docs/, with their text.

    Raises:
        ValueError: a table has no pair of markers in all pages, or more than one.
    """
    named = [ROOT / "README.md", ROOT / "bench" / "EXPERIMENTS.md", *(ROOT / "docs").rglob("*.md")]
    found = {page: page.read_text(encoding="utf-8") for page in named}
    text = "\n".join(found.values())
    for name in TABLES:
        if text.count(f"<!-- {name} -->\n") != 1 or text.count(f"\n<!-- /{name} -->") != 1:
            raise ValueError(f"the pages need one pair of markers for {name}")
    return found


def written(text: str, read: Callable[[str], Any]) -> str:
    """The text of a page with every table made from the raw results.

    Args:
        read: the raw results of a name.

    Raises:
        KeyError: a marker names no table.
    """
    return re.sub(
        r"<!-- ([\w-]+) -->\n(?:.*?\n)?<!-- /\1 -->",
        lambda found: f"<!-- {found[1]} -->\n{markdown(TABLES[found[1]](read))}\n<!-- /{found[1]} -->",
        text,
        flags=re.DOTALL,
    )


# A figure, the page that its link names ("" is the same page), and the section.
_FIGURE = re.compile(r"\[([^\]]*\d[^\]]*)\]\(((?:[\w./-]+\.md)?)#([\w-]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def unfounded(found: Mapping[Path, str]) -> list[str]:
    """Figures of ratios and percentages in links whose section does not hold them."""
    wrong = []
    for page, text in found.items():
        for figure, name, anchor in _FIGURE.findall(text):
            place = (page.parent / name).resolve() if name else page
            held = section(found.get(place, ""), anchor)
            if ("×" in figure or "%" in figure) and not re.search(rf"{re.escape(figure)}(?!\d)", held):
                wrong.append(f"{page.relative_to(ROOT)}: {figure} is not in {name}#{anchor}")
    return wrong


def section(text: str, anchor: str) -> str:
    """The text below the heading of this anchor, up to the next heading."""
    parts = _HEADING.split(text)
    slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in parts[1::2]]
    return dict(zip(slugs, parts[2::2], strict=True)).get(anchor, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = []
    shown = {}
    for page, before in pages().items():
        after = written(before, result)
        shown[page] = after
        lines = difflib.ndiff(before.splitlines(), after.splitlines())
        changed += [line for line in lines if line.startswith(("-", "+"))]
        if not check:
            page.write_text(after, encoding="utf-8")
    if check:
        sys.exit("\n".join([*changed[:20], *unfounded(shown)]) or 0)


if __name__ == "__main__":
    main()
