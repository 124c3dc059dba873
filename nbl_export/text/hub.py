"""Reads documents of hub datasets in a child process, with a limit of time and of characters.

    unavailable()          why the hub is not asked: a switch, no library, no answer within seconds
    stream(sources, ...)   child `hub_rows` ─► lines of JSON ─► documents of each source

A child can be stopped while its library waits for the network. The child's memory is freed when it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import nbl_export
from nbl_export.errors import NblError
from nbl_export.text.hub_rows import COLUMNS, split_source

__all__ = ["HubError", "HubRows", "stream", "unavailable"]

PROBE_SECONDS = 3.0
_SWITCHES = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
_ON = ("1", "ON", "YES", "TRUE")  # as the hub's library reads its switches
_PROBED = "datasets/allenai/c4/resolve/main/README.md"
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
_CHILD += "from nbl_export.text.hub_rows import main; main(sys.argv[2])"


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
    path = [*sys.path, str(Path(nbl_export.__file__).parent.parent)]
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
