"""Reads documents of hub datasets in a child process, with a limit of time and of characters.

    unavailable()          why the hub is not asked: a switch, no library, no answer within seconds
    stream(sources, ...)   child `main` ─► lines of JSON ─► documents of each source

    request   {"sources": ["org/name@split", ...], "most": characters of each dataset}      an argument of the child
    answer    ["text", 0, "one document"] ... ["end", 0, cut], then the same for source 1   lines of JSON on its stdout
              ["error", 0, "why dataset 0 cannot be read"], and the process ends

A child can be stopped while its library waits for the network. The child's memory is freed when it ends. A document is
the column `text` or `content` of a row, or its `messages` in a plain form.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from nbl_export.errors import NblError
from nbl_export.files import PACKAGE

__all__ = ["COLUMNS", "HubError", "HubRows", "answer", "main", "split_source", "stream", "unavailable"]

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


PROBE_SECONDS = 3.0
_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ON = ("1", "ON", "YES", "TRUE")  # as the hub's library reads its switches
_PROBED = "datasets/allenai/c4/resolve/main/README.md"
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_CHILD += "from nbl_export.text.hub import main; main(sys.argv[2])"


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


@dataclass(frozen=True)
class HubRows:
    """First documents of a dataset. cut: the limit of characters came before the end."""

    documents: tuple[str, ...]
    cut: bool


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
    try:
        found = importlib.util.find_spec("datasets")
    except ValueError:
        return False
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


def stream(sources: Sequence[str], most: int, seconds: float | None = None) -> list[HubRows]:
    """The first documents of hub datasets.

    Args:
        most: characters of each dataset.
        seconds: for all datasets together; None waits as long as the library tries.

    Raises:
        HubError: a dataset cannot be read, not within `seconds`, or holds no text.
        NblError: the library `datasets` is missing.
    """
    if not _has_library():
        raise NblError(f"no calibration text at {sources[0]}; if it is a hub dataset id, pip install datasets")
    path = [*sys.path, str(PACKAGE.parent)]
    request = {"sources": list(sources), "most": most}
    command = [sys.executable, "-I", "-c", _CHILD, json.dumps(path), json.dumps(request)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        late = False
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            late = True
        out.seek(0)
        return _parsed(sources, out, f"not read within {seconds:.0f} s" if late and seconds else _last_line(err))


def _parsed(sources: Sequence[str], lines: IO[bytes], otherwise: str) -> list[HubRows]:
    """Rows of each source; `otherwise` is the reason if the child did not finish."""
    documents: list[list[str]] = [[] for _ in sources]
    found: list[HubRows] = []
    for line in lines:
        if not line.endswith(b"\n"):  # the child was stopped here
            break
        kind, number, value = json.loads(line)
        if kind == "error":
            raise HubError(sources[number], value)
        if kind == "text":
            documents[number].append(value)
        else:
            if not any(map(str.strip, documents[number])):
                raise HubError(sources[number], "it holds no text")
            found.append(HubRows(tuple(documents[number]), value))
    if len(found) < len(sources):
        raise HubError(sources[len(found)], otherwise)
    return found


def _last_line(stream: IO[bytes]) -> str:
    stream.seek(0)
    lines = stream.read().decode("utf-8", "replace").split("\n")
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "the reading process ended early")
