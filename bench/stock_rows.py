"""Files of LAMBADA, ARC and PIQA in other forms, as tasks of lm-evaluation-harness on local rows.

    python bench/stock_rows.py FILES DATA          then: nbl-export eval DIR --tasks DATA/arc_easy.yaml

FILES/lambada_openai/test.jsonl                       {"context", "continuation"}            -> {"text"}
FILES/arc_easy/test.jsonl, arc_challenge/test.jsonl   {"question", "choices", "gold" from 0} -> "choices", "answerKey"
FILES/piqa/valid.jsonl, valid-labels.lst              {"goal", "sol1", "sol2"}               -> the same with "label"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.evaluation.tasks import catalogue

__all__ = ["convert", "write_task"]

Row = dict[str, Any]
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}


def convert(files: Path, data: Path) -> list[Path]:
    """Write DATA/TASK.yaml and DATA/TASK/SPLIT.jsonl for each task in `files`; return the YAML files."""
    written = []
    for task, (name, split, rows) in _TASKS.items():
        path = files / task / name
        if path.is_file():
            written.append(write_task(data, task, {split: rows(path)}))
    return written


def write_task(data: Path, task: str, splits: Mapping[str, Iterable[Row]]) -> Path:
    """Write a stock task whose documents are these rows; return its YAML file. JSON is YAML too."""
    files = {}
    for split, rows in splits.items():
        file = data.resolve() / task / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    stock = catalogue().task_index[task].yaml_path
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    absent = {kind: None for kind, split in SPLITS.items() if split not in files}
    target = data / f"{task}.yaml"
    target.write_text(json.dumps({"include": str(stock), **local, **absent}, indent=1) + "\n", encoding="utf-8")
    return target


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
