"""Ways to damage files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["cut", "edit", "flip"]


def edit(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    facts = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}), encoding="utf-8")


def cut(path: Path, keep: int) -> None:
    """Keep the first bytes only."""
    path.write_bytes(path.read_bytes()[:keep])


def flip(path: Path) -> None:
    """Change the byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
