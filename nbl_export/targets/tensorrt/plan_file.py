"""Writes a plan to its file while the library serialises it, so that no buffer of this project holds the whole plan.

    build_serialized_network_to_stream ─► parts (of at most 64 MiB in TensorRT-RTX 1.7.1) ─► decoder.engine, SHA-256

SmolLM2 in fp16 with 8 layers replaced, a plan of 276 MB: the build's peak is 1.33 GB, and 1.41 GB with a whole plan.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Plan", "finished", "plan_writer"]


@dataclass(frozen=True)
class Plan:
    """A file that was written completely."""

    size: int
    sha256: str


def plan_writer(trt: Any, path: Path) -> Any:
    """An `IStreamWriter` that replaces the file; see `finished`."""

    class Writer(trt.IStreamWriter):
        """The library swallows an exception of the callback; `failure` keeps it, and the library is told no bytes."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: Exception | None = None
            self.digest, self.size = hashlib.sha256(), 0
            self.file = path.open("wb")

        def write(self, data: bytes, *_size: int) -> int:
            try:
                self.file.write(data)
            except OSError as error:
                self.failure = error
                return 0
            self.digest.update(data)
            self.size += len(data)
            return len(data)

    return Writer()


def finished(writer: Any) -> Plan | None:
    """Close a writer's file; None if nothing was written.

    Raises:
        OSError: the disk is full.
    """
    writer.file.close()
    if writer.failure is not None:
        raise writer.failure
    return Plan(writer.size, writer.digest.hexdigest()) if writer.size else None
