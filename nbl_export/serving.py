"""Finds what runs in a run directory, or in a deployable directory by itself, and opens it for text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.artifacts import RunDirectory
from nbl_export.contained import refuse_links_out
from nbl_export.engines import load_engine
from nbl_export.engines.engine_record import RECORD_FILE, read_record
from nbl_export.engines.ort_gpu import provider_of
from nbl_export.errors import NblError
from nbl_export.plain_files import refuse_special

__all__ = ["Located", "available_engine", "is_model_directory", "locate", "open_for_text"]


@dataclass(frozen=True)
class Located:
    """A deployable directory and what it asks to be run by."""

    path: Path
    engine: str
    provider: str = "cpu"


def is_model_directory(directory: Path) -> bool:
    """Whether a directory holds a decoder itself."""
    return (directory / "genai_config.json").is_file() or (directory / RECORD_FILE).is_file()


def open_for_text(directory: Path, *, original: bool, force: bool) -> Any:
    """A runner on DIR/model (or DIR/original), or on DIR where it holds a decoder itself.

    Raises:
        NblError: the engine is not available here; and as `locate`.
    """
    found = locate(directory, original=original, force=force)
    return available_engine(found).open_runner(found.path, None)


def locate(directory: Path, *, original: bool = False, force: bool = False) -> Located:
    """The decoder of DIR/model (or DIR/original), or of DIR where it holds one itself; its files are checked.

    Raises:
        NblError: nothing to run there, or verification failed (unless `force`).
        CorruptError: a file is missing or not what was written there.
    """
    refuse_special(directory)
    if is_model_directory(directory):
        refuse_links_out(directory)
    if (directory / "genai_config.json").is_file():
        return Located(directory, "ort", provider_of(directory))
    if (directory / RECORD_FILE).is_file():
        return Located(directory, read_record(directory).engine)
    if directory.suffix == ".gguf":
        raise NblError(
            f"{directory} is for llama.cpp, which bench/peers of this project's repository runs beside our graphs"
        )
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
    return Located(directory / name, engine, provider)


def available_engine(located: Located) -> Any:
    """The engine that runs a directory.

    Raises:
        NblError: it does not run on this machine.
    """
    engine = load_engine(located.engine, located.provider)
    found = engine.probe_run()
    if not found.available:
        asked = f"engine {located.engine}" if located.provider == "cpu" else f"provider {located.provider}"
        raise NblError(f"{asked} is not available here: {found.reason}")
    return engine
