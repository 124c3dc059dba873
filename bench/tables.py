"""Writes the tables of docs/results.md from the raw results in bench/results.

    python bench/tables.py            write every table between <!-- NAME --> and <!-- /NAME -->, and the plots
    python bench/tables.py --check    only print the rows that would change; exit status 1 if there are any

The text around the tables is written by hand. The bytes of the plots depend on the version of matplotlib.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tables_codes as codes
import tables_lossless as lossless
import tables_openvino as ov
import tables_proof as proof
import tables_quality as quality
import tables_second as second
import tables_serving as serving
import tables_speed as speed

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
# Marker in the page -> the function that makes the table's rows from the raw results.
TABLES: Mapping[str, Callable[[Callable[[str], Any]], list[Sequence[str]]]] = {
    "demo": speed.demo,
    "int4": speed.int4,
    "precisions": speed.precisions,
    "codes": codes.codes,
    "codes-speed": codes.speeds,
    "codes-text": codes.texts,
    "peers": speed.peers,
    "openvino": ov.openvino,
    "engines": ov.engines,
    "errors": proof.errors,
    "twins": proof.twins,
    "parity": proof.parity,
    "ladder": quality.ladder,
    "choices": quality.choices,
    "tails": quality.tails,
    "tasks": quality.tasks,
    "graphs": quality.graphs,
    "distilled": quality.distilled,
    "sources": proof.sources,
    "architectures": proof.architectures,
    "runtimes": proof.runtimes,
    "second": second.second,
    "trained": second.trained,
    "bias": second.bias,
    "second-tasks": second.tasks,
    "second-speeds": second.speeds,
    "gguf": serving.gguf,
    "gguf-speeds": serving.gguf_speeds,
    "vllm": serving.vllm,
    "lossless": lossless.lossless,
    "lossless-tokens": lossless.tokens,
    "lossless-prefill": lossless.prefill,
    "bridge": lossless.bridge,
    "stages": second.stages,
    "taken": second.taken,
    "job-speeds": second.job_speeds,
    "shapes": second.shapes,
    "overhead": speed.overhead,
    "intervals": speed.intervals,
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


def written(text: str) -> str:
    """The text with every table made from the raw results.

    Raises:
        KeyError: a marker names no table.
        ValueError: a table has no pair of markers, or more than one.
    """
    for name in TABLES:
        if text.count(f"<!-- {name} -->\n") != 1 or text.count(f"\n<!-- /{name} -->") != 1:
            raise ValueError(f"{PAGE.name} needs one pair of markers for {name}")
    return re.sub(
        r"<!-- ([\w-]+) -->\n(?:.*?\n)?<!-- /\1 -->",
        lambda found: f"<!-- {found[1]} -->\n{markdown(TABLES[found[1]](result))}\n<!-- /{found[1]} -->",
        text,
        flags=re.DOTALL,
    )


def plots() -> None:
    """Write the plots of the sweep and of the ladder on a white background."""
    from nbl_export.report.plots import tradeoff

    sweep = result("sweep-smollm2")
    drawn = {
        "sweep-smollm2": tradeoff(sweep["points"], sweep["recommended"]),
        "ladder-smollm2": tradeoff(quality.ladder_points(result), None),
    }
    for name, svg in drawn.items():
        alone = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: #fff" ', 1)
        (ROOT / "bench" / "results" / f"{name}.svg").write_text(alone + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if parser.parse_args().check:
        old, new = before.splitlines(), after.splitlines()
        changed = [f"- {a}\n+ {b}" for a, b in zip(old, new, strict=False) if a != b]
        sys.exit("\n".join(changed[:20]) if before != after else 0)
    PAGE.write_text(after, encoding="utf-8")
    plots()


if __name__ == "__main__":
    main()
