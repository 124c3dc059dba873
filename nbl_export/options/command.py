"""The command line that repeats a job.

nbl-export --model M --engine ort --layers 8 --output DIR
printf '%s\\n' 'select = "cca"' > keys.toml && nbl-export --config keys.toml --model ...       if keys are set
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from nbl_export.options.option import MAIN, ModelFacts
from nbl_export.options.options import DEFAULTS, OPTIONS, JobOptions, flag_of

__all__ = ["KEYS_FILE", "describe_command"]

KEYS_FILE = "keys.toml"
_A_LINE_EACH = "%s\\n"


def describe_command(options: JobOptions, output: Path) -> str:
    """The command line that repeats this run; defaults are left out."""
    words = ["--model", options.model, "--engine", options.engine]
    keys = []
    for name, record in OPTIONS.items():
        value = getattr(options, name)
        # the default as far as engine and model do not decide it
        usual = DEFAULTS[name] if record.usual is None else record.usual(vars(options), None, ModelFacts())
        if MAIN not in record.commands or name == "engine" or value == usual:
            continue
        if record.key:
            keys.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        elif isinstance(value, tuple) and not record.numbers:
            words += [word for item in value for word in (flag_of(name), item)]
        else:
            words += [flag_of(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    written = f"{shlex.join(['printf', _A_LINE_EACH, *keys])} > {KEYS_FILE} && " if keys else ""
    config = ["--config", KEYS_FILE] if keys else []
    return written + shlex.join(["nbl-export", *config, *words, "--output", str(output)])
