"""Opens a run directory, or a deployable directory by itself, for text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.artifacts import RunDirectory
from nbl_export.engines import load_engine
from nbl_export.engines.engine_record import RECORD_FILE, read_record
from nbl_export.engines.ort_gpu import provider_of
from nbl_export.errors import NblError

__all__ = ["open_for_text"]


def open_for_text(directory: Path, *, original: bool, force: bool) -> Any:
    """A runner on DIR/model (or DIR/original), or on DIR where it holds a decoder itself.

    Raises:
        NblError: nothing to run there, verification failed (unless `force`), or the engine is not available.
        CorruptError: a file is missing or not what was written there.
    """
    if (directory / "genai_config.json").is_file():
        return _open("ort", directory, provider_of(directory))
    if (directory / RECORD_FILE).is_file():
        return _open(read_record(directory).engine, directory)
    if not (directory / "nbl.json").is_file():
        raise NblError(f"{directory} is neither a run directory nor a model directory; nbl-export --output makes one")
    run = RunDirectory.peek(directory)
    options = run.manifest["options"]
    engine, provider = options["engine"], options.get("provider", "cpu")
    stage, name = ("decoder", "original") if original else ("rewrite", "model")
    if load_engine(engine, provider).CAPABILITIES.static:
        stage, name = "build", f"engine/{name}"
    if stage not in run.stages:
        raise NblError(f"{directory} is not finished: run its command again ({run.manifest['command']})")
    if run.manifest["status"] == "failed" and not (force or original):
        raise NblError(f"{directory} failed verification; see its verify.json, or use --force to run it all the same")
    run.check(stage)
    return _open(engine, directory / name, provider)


def _open(engine_name: str, directory: Path, provider: str = "cpu") -> Any:
    engine = load_engine(engine_name, provider)
    found = engine.probe_run()
    if not found.available:
        asked = f"engine {engine_name}" if provider == "cpu" else f"provider {provider}"
        raise NblError(f"{asked} is not available here: {found.reason}")
    return engine.open_runner(directory, None)
