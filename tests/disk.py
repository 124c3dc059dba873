"""What a writer asks of the disk, in order."""

from __future__ import annotations

import os
from typing import Any

import pytest

__all__ = ["calls_of_os"]


def calls_of_os(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """From now on: ("fsync", the size of the file at that moment) and ("replace", the target)."""
    found: list[tuple[str, Any]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number: int) -> None:
        found.append(("fsync", os.fstat(number).st_size))
        fsync(number)

    def note_replace(source: Any, target: Any, **more: Any) -> None:
        found.append(("replace", str(target)))
        replace(source, target, **more)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return found
