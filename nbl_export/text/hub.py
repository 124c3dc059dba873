"""Reads documents of hub datasets in a child process, with a limit of time and of characters.

    unavailable()          why the hub is not asked: a switch, no library, no answer within seconds
    stream(sources, ...)   child `answer` ─► lines of JSON ─► documents of each source

    ["text", "one document"] ... ["end", truncated] of source 0, then the same of source 1
    ["error", "why this dataset cannot be read"], and the process ends

A child can be stopped while its library waits for the network. The child's memory is freed when it ends. It works in an
empty directory, because the library prefers a local folder of a dataset's name to the hub. A document is the column
`text` or `content` of a row, or its `messages` in a plain form.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nbl_export.child import Child, Write
from nbl_export.errors import NblError

__all__ = ["COLUMNS", "HubError", "answer", "split_source", "stream", "unavailable"]

COLUMNS = ("text", "content", "messages")
_ROWS = 20_000  # most rows of a dataset
_PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "SSL_CERT_FILE")  # paths, which may be relative
_LONGEST = 300  # characters of a library's error


def split_source(source: str) -> tuple[str, tuple[str, ...], str]:
    """Repository, configuration (none or one) and split of org/name[/configuration][@split]; the default is train."""
    name, _, split = source.partition("@")
    parts = name.split("/")
    return "/".join(parts[:2]), tuple(parts[2:]), split or "train"


def answer(write: Write, sources: Sequence[str], most: int, empty: Path) -> None:
    """Write the documents of each dataset, and stop at the first dataset that cannot be read.

    Args:
        most: characters of each dataset.
        empty: the directory to work in.
    """
    for name in _PLACES:
        if place := os.environ.get(name):
            os.environ[name] = os.path.abspath(os.path.expanduser(place))
    os.chdir(empty)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the library prints
    for source in sources:
        left = most
        try:
            for document in _documents(source):
                write(["text", document[:left]])
                left -= len(document)
                if left <= 0:
                    break
            write(["end", left <= 0])
        except Exception as error:  # the library raises many kinds
            write(["error", _describe(error)])
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
    try:
        return "\n\n".join(message["role"] + ": " + message["content"] for message in messages)
    except (TypeError, LookupError):
        return None


def _describe(error: Exception) -> str:
    text = " ".join(str(error).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


PROBE_SECONDS = 3.0
_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ON = ("1", "ON", "YES", "TRUE")  # as the hub's library reads its switches
_PROBED = "datasets/allenai/c4/resolve/main/README.md"


class HubError(NblError):
    """A hub dataset cannot be read. source: its id. reason: why, without advice."""

    def __init__(self, source: str, reason: str) -> None:
        split = split_source(source)[2]
        super().__init__(
            f"hub dataset {source} cannot be read ({reason}); "
            f"it needs a split {split} and a column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}"
        )
        self.source = source
        self.reason = reason


def unavailable() -> str:
    """Why the default text cannot come from the hub, in words; "" if the hub answers within `PROBE_SECONDS`."""
    for switch in _SWITCHES:
        if os.environ.get(switch, "").upper() in _ON:
            return f"{switch} is set"
    if not _has_library():
        return "the package datasets is not installed"
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    answers: list[bool] = []
    asking = threading.Thread(target=lambda: answers.append(_answers(endpoint)), daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)  # the socket's own limit does not cover the look-up of a name
    return "" if any(answers) else f"the hub {endpoint} does not answer"


def _has_library() -> bool:
    found = importlib.util.find_spec("datasets")
    return found is not None and found.origin is not None  # a mere folder of this name has no origin


def _answers(endpoint: str) -> bool:
    """Whether a server answers; a refusal or a certificate that this check does not know is an answer too."""
    try:
        request = urllib.request.Request(f"{endpoint}/{_PROBED}", method="HEAD")
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError) as error:
        return "CERTIFICATE_VERIFY_FAILED" in str(error)


def stream(sources: Sequence[str], most: int, seconds: float | None = None) -> list[tuple[tuple[str, ...], bool]]:
    """The first documents of hub datasets, and whether the limit of characters came before a dataset's end.

    Args:
        most: characters of each dataset.
        seconds: for all datasets together; None waits as long as the library tries.

    Raises:
        HubError: a dataset cannot be read, not within `seconds`, or holds no text.
        NblError: the library `datasets` is missing.
    """
    if not _has_library():
        raise NblError(f"no calibration text at {sources[0]}; if it is a hub dataset id, pip install datasets")
    found: list[tuple[tuple[str, ...], bool]] = []
    end = None if seconds is None else time.monotonic() + seconds
    with (
        tempfile.TemporaryDirectory(prefix="nbl-export-") as empty,
        Child(answer, list(sources), most, Path(empty)) as child,
    ):
        for source in sources:
            documents: list[str] = []
            while True:
                try:
                    line = child.answer(None if end is None else max(0.0, end - time.monotonic()))
                except TimeoutError:
                    raise HubError(source, f"not read within {seconds:.0f} s") from None
                said: Any = line or ("error", f"the reading process {child.ending()}")
                kind, value = said
                if kind != "text":
                    break
                documents.append(value)
            if kind == "error":
                raise HubError(source, value)
            if not any(map(str.strip, documents)):
                raise HubError(source, "it holds no text")
            found.append((tuple(documents), value))
    return found
