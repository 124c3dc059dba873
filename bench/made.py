"""Puts a raw result into bench/results, with what made it.

    python bench/made.py NAME RAW.json --command "nbl-export --model MODEL --layers 8" --layers 7,14,15,25-29 --chosen

The entry "made" of a raw result:

    commands    the commands that made it, in order; a test asks today's program for each of their options
    layers      the sets of replaced layers that it is about
    rule        number of the rule that chose these layers (`nbl_export.methods.linear.greedy.RULE`); null if they
                were named, or if the result is about these layers, whoever chose them
    versions, machine    beside "made"; of this machine if the raw result has none, so call this right after the run

A new rule has a new number. Then a test names the results of the old one: measure them again, or remove their tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nbl_export.files import versions
from nbl_export.measure.benchmark import machine
from nbl_export.methods.linear.greedy import RULE
from nbl_export.options.goals import parse_layers
from nbl_export.run_directory import PACKAGES

RESULTS = Path(__file__).resolve().parent / "results"
_MOST_LAYERS = 1000


def made(commands: list[str], sets: list[str], *, chosen: bool) -> dict[str, Any]:
    """The entry for some commands and sets of layers ("7,9,25-29" each)."""
    layers = [list(parse_layers(f"{text},", _MOST_LAYERS)) for text in sets]  # type: ignore[arg-type]
    return {"commands": commands, "layers": layers, "rule": RULE if chosen else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the file in bench/results, without .json")
    parser.add_argument("raw", type=Path, help="what the program or script printed")
    parser.add_argument("--command", action="append", required=True)
    parser.add_argument("--layers", action="append", default=[])
    parser.add_argument("--chosen", action="store_true", help="the layers are those of the program's own rule")
    asked = parser.parse_args()
    value = json.loads(asked.raw.read_text(encoding="utf-8"))
    entry = made(asked.command, asked.layers, chosen=asked.chosen)
    value = {"made": entry, "machine": machine(), "versions": dict(versions(PACKAGES)), **value}
    target = RESULTS / f"{asked.name}.json"
    target.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
