"""`--config FILE`: options from TOML or from another run's nbl.json. Flags have priority over the file.

layers = "7,9,15,25-29"          the names of the options, with dashes or underscores
calibration = ["a.txt:2", "b.jsonl"]
depth = "0,2048"                 numbers as on the command line, or as a list
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from pathlib import Path
from typing import Any

from nbl_export.cli.options import numbers
from nbl_export.errors import UsageError
from nbl_export.records.from_json import read_record
from nbl_export.records.option import options_of
from nbl_export.records.options import JobOptions
from nbl_export.trust.strict_json import read_object

__all__ = ["read_config"]

_MOST_BYTES = 1 << 20


def read_config(path: Path) -> dict[str, Any]:
    """The options of a file, by the field names of JobOptions.

    Raises:
        UsageError: the file cannot be read, or has an unknown option or a wrong value.
    """
    found = _of_run(path) if path.suffix == ".json" else _of_toml(path)
    try:
        read_record(JobOptions, {"model": "", **found})
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    return found


def _of_run(path: Path) -> dict[str, Any]:
    manifest = read_object(path, _MOST_BYTES)
    options, places = manifest.get("options"), manifest.get("places")
    if not isinstance(options, dict):
        raise UsageError(f"{path} is not the nbl.json of a run, because it has no options")
    places = places if isinstance(places, dict) else {}
    at = {"model": places.get("model"), "calibration": places.get("calibration")}
    known = {field.name for field in dataclasses.fields(JobOptions)}
    chosen = {**options, **{name: place for name, place in at.items() if place}}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items() if k in known}


def _of_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} is too large for a configuration")
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {path} cannot be read ({error})") from error
    names = {"model": "model", **{said.flag or name: name for name, said in options_of(JobOptions).items()}}
    return dict(_value(path, names, key, value) for key, value in given.items())


def _value(path: Path, names: dict[str, str], key: str, value: Any) -> tuple[str, Any]:
    """The field name of JobOptions, and the value in the type of this field."""
    flag = key.replace("-", "_")
    if flag not in names:
        near = difflib.get_close_matches(flag, names, 1)
        raise UsageError(f"{path}: {key} is no option" + (f"; did you mean {near[0]}?" if near else ""))
    name = names[flag]
    said = options_of(JobOptions).get(name)
    if said is not None and said.numbers and isinstance(value, (str, int)) and not isinstance(value, bool):
        return name, numbers(str(value), said, name)
    if name in ("calibration", "builder_option") and isinstance(value, str):
        return name, (value,)
    wants_text = name in ("layers", "rank", "max_perplexity_increase", "target_speedup", "kv_budget")
    if wants_text and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    return name, tuple(value) if isinstance(value, list) else value
