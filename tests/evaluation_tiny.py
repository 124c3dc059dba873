"""Task files and requests that are small enough for a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

__all__ = ["LAMBADA", "PIQA", "QUESTIONS", "WIKI", "request", "write_rows", "write_tasks"]

LAMBADA: list[dict[str, Any]] = [
    {"context": "The with statement is used to wrap the execution of a", "continuation": "block"},
    {"context": "An assert statement is a convenient way to insert debugging", "continuation": "assertions"},
    {"context": "The import statement binds\n\nthe name", "continuation": "module."},
]
QUESTIONS: list[dict[str, Any]] = [
    {"question": "Which statement ends a loop?", "choices": ["break", "pass", "import a module", "def"], "gold": 0},
    {"question": "What does a function return?", "choices": ["a loop", "a value", "nothing at all"], "gold": 1},
    {"question": "Where is a name bound?", "choices": ["in a scope", "in a string"], "gold": 0},
]
PIQA: list[dict[str, Any]] = [
    {"goal": "To open a file", "sol1": "call open with its name", "sol2": "call close with its name"},
    {"goal": "To leave a loop,", "sol1": "use the pass statement.", "sol2": "use break."},
]
PIQA_LABELS = (0, 1)
WIKI = " \n = First = \n \n The first article . \n = = Part = = \n \n More of it . \n = Second = \n \n Another one . \n"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tasks(directory: Path) -> Path:
    """A data directory with four tiny tasks."""
    write_rows(directory / "lambada_openai" / "test.jsonl", LAMBADA)
    write_rows(directory / "arc_easy" / "test.jsonl", QUESTIONS)
    write_rows(directory / "piqa" / "valid.jsonl", PIQA)
    (directory / "piqa" / "valid-labels.lst").write_text("\n".join(map(str, PIQA_LABELS)) + "\n")
    (directory / "wikitext").mkdir()
    (directory / "wikitext" / "wiki.valid.raw").write_text(WIKI)
    return directory


def request(*arguments: Any) -> Any:
    """What the harness hands to a model."""
    return SimpleNamespace(args=arguments)
