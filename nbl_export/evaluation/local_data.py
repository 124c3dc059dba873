"""Reads documents of a stock task's data set from local files.

DIR/TASK/SPLIT.jsonl               rows of the stock data set, unchanged, for any task
lambada_openai  test.jsonl         {"context", "continuation"}            -> {"text"}
arc_easy, arc_challenge test.jsonl {"question", "choices", "gold" from 0} -> {"question", "choices", "answerKey"}
piqa            valid.jsonl + valid-labels.lst  {"goal", "sol1", "sol2"}  -> the same with "label"
wikitext        wiki.test.raw or wiki.valid.raw (also in wikitext-2-raw/) -> {"page"}, one an article
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError

__all__ = ["LocalData", "find_local", "wikitext_pages"]

_NAMES = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}  # split -> file stems
_MOST_BYTES = 64 << 20  # of one file; all of its documents are in memory
Row = dict[str, Any]


@dataclass(frozen=True)
class LocalData:
    """Documents in the stock data set's form, the split that they replace, and the name and hash of their file."""

    name: str
    split: str
    sha256: str
    documents: tuple[Row, ...]


def find_local(task: str, directory: Path, stock: dict[str, Any]) -> LocalData | None:
    """Documents of a task below `directory`: the test split, else the validation split; None without a file.

    Args:
        stock: the harness' configuration of the task.

    Raises:
        NblError: `directory` is not a directory, or a file is empty or damaged or lacks a field.
    """
    if not directory.is_dir():
        raise NblError(f"--data {directory} is not a directory")
    for kind in ("test_split", "validation_split"):
        split = stock.get(kind)
        if not isinstance(split, str):
            continue
        for stem in _NAMES.get(split, (split,)):
            if task == "wikitext":
                for folder in (task, "wikitext-2-raw"):
                    path = directory / folder / f"wiki.{stem}.raw"
                    if path.is_file():
                        return _wikitext(path, split)
            path = directory / task / f"{stem}.jsonl"
            if path.is_file():
                return _rows(task, path, split)
    return None


def _rows(task: str, path: Path, split: str) -> LocalData:
    raw = _read(path)
    rows = []
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NblError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise NblError(f"{path}, line {number} is not an object with fields")
        rows.append(row)
    if not rows:
        raise NblError(f"{path} has no documents")
    labels = _labels(path, len(rows))
    if labels is not None:
        rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
        raw += "\n".join(map(str, labels)).encode()
    fields = tuple(rows[0])
    for needed, convert in _FORMS.get(task, ()):
        if set(needed) <= set(fields):
            fields, chosen = needed, convert
            break
    else:
        chosen = dict
        _require_known_form(task, path, fields)
    documents = tuple(_converted(path, number, row, fields, chosen) for number, row in enumerate(rows, 1))
    return LocalData(str(path), split, hashlib.sha256(raw).hexdigest(), documents)


def _require_known_form(task: str, path: Path, fields: Sequence[str]) -> None:
    """Refuse documents that have neither the fields of a local form nor those of the stock data set."""
    forms = [needed for needed, _ in _FORMS.get(task, ())]
    stock = _STOCK_FIELDS.get(task)
    if stock is None or set(stock) <= set(fields):
        return
    nearest = max((*forms, stock), key=lambda needed: len(set(needed) & set(fields)))
    missing = [name for name in nearest if name not in fields]
    raise NblError(f"{path}, document 1 has no field {missing[0]!r}; task {task} needs {', '.join(nearest)}")


def _converted(path: Path, number: int, row: Row, fields: Sequence[str], convert: Callable[[Row], Row]) -> Row:
    # A stock row may hold null; a converted row may not.
    missing = [name for name in fields if name not in row or (convert is not dict and row[name] is None)]
    if missing:
        raise NblError(f"{path}, document {number} has no field {missing[0]!r}")
    try:
        return convert(row)
    except (TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        raise NblError(f"{path}, document {number} is not of the expected form: {error}") from error


def _labels(path: Path, count: int) -> list[int] | None:
    """Answers from a separate file, as PIQA has them; None without this file."""
    beside = path.with_name(f"{path.stem}-labels.lst")
    if not beside.is_file():
        return None
    try:
        labels = [int(word) for word in _read(beside).split()]
    except ValueError as error:
        raise NblError(f"{beside} is not a list of numbers: {error}") from error
    if len(labels) != count:
        raise NblError(f"{beside} has {len(labels)} answers for the {count} documents of {path}")
    return labels


def _lambada(row: Row) -> Row:
    continuation = str(row["continuation"]).strip()
    if len(continuation.split(" ")) != 1:
        raise ValueError(f"the continuation {continuation!r} is not one word")
    return {"text": f"{row['context']} {continuation}"}


def _arc(row: Row) -> Row:
    choices, gold = [str(choice) for choice in row["choices"]], int(row["gold"])
    if not 0 <= gold < len(choices):
        raise ValueError(f"gold {gold} of {len(choices)} choices")
    labels = [chr(ord("A") + i) for i in range(len(choices))]
    return {
        "question": row["question"],
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[gold],
    }


def _piqa(row: Row) -> Row:
    if row["label"] not in (0, 1):
        raise ValueError(f"label {row['label']!r} is neither 0 nor 1")
    return {name: row[name] for name in ("goal", "sol1", "sol2", "label")}


# task -> local forms beside the stock data set's own: fields, and the conversion to stock fields
_FORMS: dict[str, tuple[tuple[tuple[str, ...], Callable[[Row], Row]], ...]] = {
    "lambada_openai": ((("context", "continuation"), _lambada),),
    "arc_easy": ((("question", "choices", "gold"), _arc),),
    "arc_challenge": ((("question", "choices", "gold"), _arc),),
    "piqa": ((("goal", "sol1", "sol2", "label"), _piqa),),
}
_STOCK_FIELDS = {
    "lambada_openai": ("text",),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "piqa": ("goal", "sol1", "sol2", "label"),
}


def _wikitext(path: Path, split: str) -> LocalData:
    raw = _read(path)
    pages = wikitext_pages(raw.decode("utf-8"))
    if not pages:
        raise NblError(f"{path} has no documents")
    return LocalData(str(path), split, hashlib.sha256(raw).hexdigest(), tuple({"page": page} for page in pages))


def wikitext_pages(text: str) -> list[str]:
    """Articles of a WikiText file; each begins with its title line (` = Title = `).

    The articles are those of EleutherAI/wikitext_document_level, which the stock task reads. A section heading
    (` = = Section = = `) is not a title.
    """
    pages: list[str] = []
    current: list[str] = []
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append("\n".join(current))
            current = []
        current.append(line)
    pages.append("\n".join(current))
    return [page for page in pages if page.strip()]


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise NblError(f"{path} is larger than {_MOST_BYTES >> 20} MiB; give its first documents only")
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES)
        raw.decode("utf-8")
    except OSError as error:
        raise NblError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise NblError(f"{path} is not UTF-8 (byte {error.start}); convert it with iconv") from error
    if not raw.strip():
        raise NblError(f"{path} is empty")
    return raw
