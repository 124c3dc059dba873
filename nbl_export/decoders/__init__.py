"""Sources of decoder graphs: a checkpoint in, a GenAI model directory out, one file a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbl_export.decoders import genai, mobius
from nbl_export.decoders.directory import finish_directory

__all__ = ["PRECISIONS", "SOURCES", "build_decoder"]

SOURCES: dict[str, Callable[[Path, Path, str], None]] = {"genai": genai.build, "mobius": mobius.build}
PRECISIONS = {"genai": genai.PRECISIONS, "mobius": mobius.PRECISIONS}


def build_decoder(source: str, checkpoint: Path, out: Path, precision: str) -> None:
    """Export a checkpoint directory to a deployable directory with the named source.

    Raises:
        NblError: the source refuses the checkpoint or the precision, with its reason.
    """
    SOURCES[source](checkpoint, out, precision)
    finish_directory(checkpoint, out)
