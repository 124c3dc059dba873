"""Streams rows of hub datasets, in a process of its own that `hub` starts and can stop at any time.

    request   {"sources": ["org/name@split", ...], "most": characters of each dataset}      an argument
    answer    ["text", 0, "one document"] ... ["end", 0, cut], then the same for source 1   lines of JSON on stdout
              ["error", 0, "why dataset 0 cannot be read"], and the process ends

A document is the column `text` or `content` of a row, or its `messages` in a plain form.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["COLUMNS", "answer", "main", "split_source"]

COLUMNS = ("text", "content", "messages")
_ROWS = 20_000  # most rows of a dataset
_LONGEST = 300  # characters of a library's error


def split_source(source: str) -> tuple[str, tuple[str, ...], str]:
    """Repository, configuration (none or one) and split of org/name[/configuration][@split]; the default is train."""
    name, _, split = source.partition("@")
    parts = name.split("/")
    return "/".join(parts[:2]), tuple(parts[2:]), split or "train"


def answer(request: Any, write: Callable[[list[Any]], None]) -> None:
    """Write the documents of each dataset, and stop at the first dataset that cannot be read."""
    for number, source in enumerate(request["sources"]):
        try:
            most = int(request["most"])
            for document in _documents(source):
                write(["text", number, document[:most]])
                most -= len(document)
                if most <= 0:
                    break
            write(["end", number, most <= 0])
        except Exception as error:  # the library raises many kinds
            write(["error", number, _said(error)])
            return


def _documents(source: str) -> Iterator[str]:
    """The documents of a dataset's first rows.

    Raises:
        ValueError: the dataset has none of `COLUMNS`, or a row holds no text. The library raises many other errors.
    """
    import datasets

    repository, configuration, split = split_source(source)
    rows = datasets.load_dataset(repository, *configuration, split=split, streaming=True)
    column = None
    for number, row in enumerate(itertools.islice(rows, _ROWS), 1):
        column = column or next((name for name in COLUMNS if name in row), None)
        if column is None:
            raise ValueError(f"its columns are {', '.join(row)}")
        value = row.get(column)
        document = _chat(value) if column == "messages" else value
        if not isinstance(document, str):
            raise ValueError(f"row {number} of the column {column} holds no text ({type(value).__name__})")
        yield document


def _chat(messages: Any) -> str | None:
    """Role and content of each message, with an empty line between messages; None if these are no messages."""
    said = []
    for message in messages if isinstance(messages, list) else [None]:
        role, content = (message.get(k) for k in ("role", "content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        said.append(f"{role}: {content}")
    return "\n\n".join(said)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def main(request: str) -> None:
    """Answer on stdout, and end without the clean-up of libraries, which can wait for a network."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", 1, encoding="ascii")  # 1: a stopped process leaves whole lines
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer

    def write(line: list[Any]) -> None:
        out.write(json.dumps(line) + "\n")

    answer(json.loads(request), write)
    out.close()
    os._exit(0)
