"""The command line that repeats a job."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from nbl_export.options.model_facts import ModelFacts
from nbl_export.options.option import MAIN
from nbl_export.options.options import OPTIONS, JobOptions, flag_of

__all__ = ["describe_command"]


def describe_command(options: JobOptions, output: Path) -> str:
    """The command line that repeats this run; defaults are left out."""
    words = ["nbl-export", "--model", options.model, "--engine", options.engine]
    command = shlex.join([*words, *_flags(options, MAIN, {"engine"}), "--output", str(output)])
    asked = _flags(options, "bench", {n for n, record in OPTIONS.items() if MAIN in record.commands})
    return command + (f" && {shlex.join(['nbl-export', 'bench', str(output), *asked])}" if asked else "")


def _flags(options: JobOptions, command: str, without: set[str]) -> list[str]:
    words = []
    for name, record in OPTIONS.items():
        value = getattr(options, name)
        if command not in record.commands or name in without or value == _default(options, name):
            continue
        if isinstance(value, tuple) and not record.numbers:
            words += [word for item in value for word in (flag_of(name), item)]
        elif value is True:
            words.append(flag_of(name))
        else:
            words += [flag_of(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def _default(options: JobOptions, name: str) -> Any:
    """The value that the option has without being asked for; `...` if another engine than the default decides."""
    fixed = {field.name: field.default for field in dataclasses.fields(JobOptions)}
    usual = OPTIONS[name].usual
    found = fixed[name] if usual is None else usual(vars(options), None, ModelFacts())
    if found is not None or usual is None:
        return found
    is_default = (options.engine, options.provider) == (fixed["engine"], fixed["provider"])
    return fixed[name] if is_default else ...
