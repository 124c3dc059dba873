"""Opens a run directory, or a deployable directory by itself, for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbl_export.engines import load_engine
from nbl_export.errors import CorruptError, NblError

__all__ = ["open_for_text"]


def open_for_text(directory: Path, *, original: bool, force: bool) -> Any:
    """A runner on DIR/model (or DIR/original), or on DIR where it holds a decoder itself.

    Raises:
        NblError: nothing to run there, verification failed (unless `force`), or the engine is not available.
    """
    if (directory / "genai_config.json").is_file():
        return _open("ort", directory)
    if not (directory / "nbl.json").is_file():
        raise NblError(f"{directory} is neither a run directory nor a model directory; nbl-export --output makes one")
    try:
        manifest = json.loads((directory / "nbl.json").read_text(encoding="utf-8"))
        engine, status, stages = manifest["options"]["engine"], manifest["status"], manifest["stages"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{directory / 'nbl.json'} cannot be read ({error}); restore it") from error
    if "rewrite" not in stages:
        raise NblError(f"{directory} is not finished: run its command again ({manifest.get('command', 'nbl-export')})")
    if status == "failed" and not (force or original):
        raise NblError(f"{directory} failed verification; see its verify.json, or use --force to run it all the same")
    return _open(engine, directory / ("original" if original else "model"))


def _open(engine_name: str, directory: Path) -> Any:
    engine = load_engine(engine_name)
    found = engine.probe()
    if not found.available:
        raise NblError(f"engine {engine_name} is not available here: {found.reason}")
    return engine.open_runner(directory, None)
