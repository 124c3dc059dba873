"""Task files and requests that are small enough for a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["LAMBADA", "PIQA", "QUESTIONS", "TASKS", "request", "write_rows", "write_task", "write_tasks"]

LAMBADA: list[dict[str, Any]] = [
    {"text": "The with statement is used to wrap the execution of a block"},
    {"text": "An assert statement is a convenient way to insert debugging assertions"},
    {"text": "The import statement binds\n\nthe name module."},
]
QUESTIONS: list[dict[str, Any]] = [
    {"question": question, "choices": {"text": choices, "label": list("ABCD")[: len(choices)]}, "answerKey": key}
    for question, choices, key in (
        ("Which statement ends a loop?", ["break", "pass", "import a module", "def"], "A"),
        ("What does a function return?", ["a loop", "a value", "nothing at all"], "B"),
        ("Where is a name bound?", ["in a scope", "in a string"], "A"),
    )
]
PIQA: list[dict[str, Any]] = [
    {"goal": "To open a file", "sol1": "call open with its name", "sol2": "call close with its name", "label": 0},
    {"goal": "To leave a loop,", "sol1": "use the pass statement.", "sol2": "use break.", "label": 1},
]
WIKI: list[dict[str, Any]] = [
    {"page": " = First = \n \n The first article . \n = = Part = = \n \n More of it . "},
    {"page": " = Second = \n \n Another one . \n"},
]
SPLITS = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
TASKS = {"lambada_openai": LAMBADA, "arc_easy": QUESTIONS, "piqa": PIQA, "wikitext": WIKI}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(directory: Path, task: str, **splits: list[dict[str, Any]]) -> Path:
    """A stock task whose splits are local rows, as docs/evaluation.md describes. JSON is YAML too."""
    from nbl_export.evaluation.tasks import catalogue

    files = {split: str(write_rows(directory / task / f"{split}.jsonl", rows)) for split, rows in splits.items()}
    settings = {
        "include": str(catalogue().task_index[task].yaml_path),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        **{kind: None for kind, split in SPLITS.items() if split not in files},
    }
    path = directory / f"{task}.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def write_tasks(directory: Path) -> dict[str, Path]:
    """Files of four tiny tasks by their names."""
    splits = {"piqa": "validation"}
    return {task: write_task(directory, task, **{splits.get(task, "test"): rows}) for task, rows in TASKS.items()}


def request(*arguments: Any) -> Any:
    """What the harness hands to a model."""
    return SimpleNamespace(args=arguments)
