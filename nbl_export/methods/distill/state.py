"""An unfinished training on disk.

DIR/distill.partial.safetensors    parameters.*, optimizer.*, best.*; metadata: key, facts (JSON), and sha256 of all
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbl_export.files import arrays_sha256, key_of, parse_json, replacing

__all__ = ["State"]


class State:
    """A training run between its steps, in a file.

    Args:
        key: fingerprint of everything that the run depends on. A damaged file, or one with another key, is ignored.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key

    def load(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Tensors and facts; None if the file is ignored or missing."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.path), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            whole = said["sha256"] == _hash({name: tensor.numpy() for name, tensor in tensors.items()}, said["facts"])
            return (tensors, parse_json(said["facts"])) if whole else None
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def save(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Replace the file, complete or not at all."""
        from safetensors.numpy import save as serialised

        arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
        said = {"key": self.key, "facts": json.dumps(facts)}
        with replacing(self.path) as stream:
            stream.write(serialised(arrays, metadata={**said, "sha256": _hash(arrays, said["facts"])}))


def _hash(arrays: dict[str, Any], facts: str) -> str:
    return key_of(arrays_sha256(arrays), facts)
