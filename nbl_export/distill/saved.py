"""An unfinished distillation on disk, to resume after a kill: one safetensors file, replaced as a whole.

DIR/distill.partial.safetensors    parameters.*, optimizer.*, best.*; metadata: key, facts (JSON)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbl_export.files import replaced

__all__ = ["FileState"]


class FileState:
    """`settings.State` in a file.

    Args:
        key: fingerprint of everything that the run depends on. A damaged file, or one with another key, is ignored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and facts; None if the file is ignored or missing."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(said["facts"])  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a temporary file, then rename it."""
        from safetensors.torch import save_file

        said = {"key": self.key, "facts": json.dumps(facts)}
        with replaced(self.path) as scratch:
            save_file({name: t.contiguous() for name, t in tensors.items()}, scratch, metadata=said)
