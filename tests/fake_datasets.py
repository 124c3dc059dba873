"""A stand-in for the library `datasets`, found in front of the real library by this process's children. No network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.text.mixture import HUB_MIX

__all__ = ["MIX_ROWS", "FakeDatasets"]

_MODULE = """
import json, time
from pathlib import Path

HERE = Path(__file__).parent


def load_dataset(*names, split, streaming):
    assert streaming
    source = "/".join(names) + "@" + split
    with open(HERE / "asked", "a") as log:
        log.write(source + "\\n")
    print("a library that prints")
    return rows(json.loads((HERE / "rows.json").read_text())[source])


def rows(found):
    for row in found:
        if row == "break":
            raise ConnectionError("the network\\nis gone")
        if row == "hang":
            time.sleep(600)
        if row == "die":
            import os
            os._exit(9)
        yield row
"""
_WORDS = "some words of a row that is long enough to be cut into windows of a few tokens, and to be told apart. "
MIX_ROWS: dict[str, list[Any]] = {
    HUB_MIX[0]: [{"text": f"web {i}: {_WORDS * 8}", "url": "u"} for i in range(60)],
    HUB_MIX[1]: [{"repo_name": "r", "content": f"def code_{i}():\n    return '''{_WORDS * 8}'''"} for i in range(60)],
    HUB_MIX[2]: [
        {"prompt": "p", "messages": [{"role": "user", "content": f"chat {i}?"},
                                     {"role": "assistant", "content": _WORDS * 8}]} for i in range(60)
    ],
}  # fmt: skip


class FakeDatasets:
    """The library's rows: source with its split -> rows; "break", "hang" and "die" among rows happen there."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._directory = directory
        directory.mkdir()
        (directory / "datasets.py").write_text(_MODULE, encoding="utf-8")
        self.serve(MIX_ROWS)
        monkeypatch.syspath_prepend(str(directory))

    def serve(self, rows: dict[str, Any]) -> None:
        """Change what the library gives."""
        (self._directory / "rows.json").write_text(json.dumps(rows), encoding="utf-8")

    @property
    def asked(self) -> Sequence[str]:
        """Sources in the order in which they were asked for."""
        log = self._directory / "asked"
        return log.read_text(encoding="utf-8").split() if log.exists() else ()
