"""Files of LAMBADA, ARC and PIQA in other forms, as rows of the data sets that lm-evaluation-harness reads.

    python bench/stock_rows.py FILES DATA          then: nbl-export eval DIR --tasks ... with the key data

FILES/lambada_openai/test.jsonl                       {"context", "continuation"}            -> {"text"}
FILES/arc_easy/test.jsonl, arc_challenge/test.jsonl   {"question", "choices", "gold" from 0} -> "choices", "answerKey"
FILES/piqa/valid.jsonl, valid-labels.lst              {"goal", "sol1", "sol2"}               -> the same with "label"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["convert"]

Row = dict[str, Any]


def convert(files: Path, data: Path) -> list[Path]:
    """Write DATA/TASK/SPLIT.jsonl for each task in `files`; return what is written."""
    written = []
    for task, (name, split, rows) in _TASKS.items():
        path = files / task / name
        if path.is_file():
            target = data / task / f"{split}.jsonl"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(json.dumps(row) + "\n" for row in rows(path)), encoding="utf-8")
            written.append(target)
    return written


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _lambada(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        continuation = row["continuation"].strip()
        assert " " not in continuation, f"{continuation!r} is not one word"
        yield {"text": f"{row['context']} {continuation}"}


def _arc(path: Path) -> Iterator[Row]:
    for row in _lines(path):
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        choices = {"text": row["choices"], "label": labels}
        yield {"question": row["question"], "choices": choices, "answerKey": labels[row["gold"]]}


def _piqa(path: Path) -> Iterator[Row]:
    labels = path.with_name("valid-labels.lst").read_text().split()
    for row, label in zip(_lines(path), labels, strict=True):
        yield {**{name: row[name] for name in ("goal", "sol1", "sol2")}, "label": int(label)}


_TASKS = {
    "lambada_openai": ("test.jsonl", "test", _lambada),
    "arc_easy": ("test.jsonl", "test", _arc),
    "arc_challenge": ("test.jsonl", "test", _arc),
    "piqa": ("valid.jsonl", "validation", _piqa),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path)
    parser.add_argument("data", type=Path)
    given = parser.parse_args()
    for file in convert(given.files, given.data):
        print(file)
