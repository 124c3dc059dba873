"""`--config FILE`: options from TOML or from another run's nbl.json. Flags have priority over the file.

layers = "7,9,15,25-29"          the names of the options, with dashes or underscores
calibration = ["a.txt:2", "b.jsonl"]
depth = "0,2048"                 numbers as on the command line, or as a list
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from nbl_export.errors import UsageError
from nbl_export.records.asked import read_asked
from nbl_export.records.from_json import read_record
from nbl_export.records.options import JobOptions
from nbl_export.trust.strict_json import read_object

__all__ = ["read_config"]

_MOST_BYTES = 1 << 20


def read_config(path: Path) -> tuple[dict[str, Any], JobOptions | None]:
    """The options that a TOML file asks for, by the field names of JobOptions; or none, and the options of a run.

    Raises:
        UsageError: the file cannot be read, or has an unknown option or a wrong value.
    """
    if not path.exists():
        raise UsageError(f"--config {path} cannot be read: there is no such file")
    is_run = path.suffix == ".json"
    values = _of_run(path) if is_run else _of_toml(path)
    try:
        if is_run:
            return {}, read_record(JobOptions, values)
        found = read_asked(values)
        read_record(JobOptions, {"model": "", **found})
    except (TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    return found, None


def _of_run(path: Path) -> dict[str, Any]:
    manifest = read_object(path, _MOST_BYTES)
    options, places = manifest.get("options"), manifest.get("places")
    if not isinstance(options, dict):
        raise UsageError(f"--config {path} is not the nbl.json of a run, because it has no options")
    places = places if isinstance(places, dict) else {}
    at = {"model": places.get("model"), "calibration": places.get("calibration")}
    known = {field.name for field in dataclasses.fields(JobOptions)}
    chosen = {**options, **{name: place for name, place in at.items() if place}}
    return {name: value for name, value in chosen.items() if name in known}


def _of_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"--config {path} is too large for a configuration")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} cannot be read as TOML: {error}") from error
