"""Every raw result says what made it, and today's program could still make it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from nbl_export.cli.app import KEYS, app
from nbl_export.methods.linear.greedy import RULE
from nbl_export.options.options import JobOptions

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bench" / "results").glob("*.json"))
# Simulations, and equal tokens, are the same on every machine.
ANY_MACHINE = {"intervals", "coverage-perplexity", "looks", "runtimes-smollm2"}

# Options of the harness' own command line that our raw results used.
HARNESS = {"--model", "--model_args", "--tasks", "--num_fewshot", "--limit"}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def known_options(program: list[str]) -> set[str]:
    """The options of a command: nbl-export's flags and keys, or of a script by its own words."""
    if program[0] == "nbl-export":
        command = app.commands.get(program[1], app)
        keys = {f"--{key.replace('_', '-')}" for key in KEYS}  # a raw result may have typed them
        return {name for parameter in command.params for name in parameter.opts} | keys
    if program[0] == "lm_eval":
        return HARNESS
    script = ROOT / program[1]
    words = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8")))
    if "OPTIONS of the main job" in script.read_text(encoding="utf-8"):
        words |= known_options(["nbl-export", ""])
    return words


def unknown(command: str) -> list[str]:
    """The options of a command that today's program does not have."""
    words = shlex.split(command)
    return sorted({w for w in words if w.startswith("--")} - known_options(words))


def complaints(name: str, value: Any) -> list[str]:
    """What a raw result lacks, or has of another program than today's."""
    made = value.get("made") or {}
    found = [] if made.get("commands") else [f"{name}: no command"]
    today = made.get("today", {})  # another command makes the same now
    for command in made.get("commands", ()):
        command = today.get(command, command)
        found += [f"{name}: {option} is no option of today's program" for option in unknown(command)]
    if made.get("rule", "none") not in (None, RULE):
        found.append(f"{name}: its layers were chosen by rule {made.get('rule')}, and today's is {RULE}")
    found += [f"{name}: no {key}" for key in ("machine", "versions") if not value.get(key) and name not in ANY_MACHINE]
    if isinstance(value.get("options"), dict):
        dead = set(value["options"]) - {*JobOptions.__dataclass_fields__, *made.get("options_that_left", ())}
        found += [f"{name}: {option} is no option of a job today" for option in sorted(dead)]
    if "replaced_layers" in value and [value["replaced_layers"]] != made.get("layers"):
        found.append(f"{name}: layers {made.get('layers')}, but the result is of {value['replaced_layers']}")
    return found


def test_raw_results_are_of_today() -> None:
    assert len(FILES) >= 30
    assert [found for path in FILES for found in complaints(path.stem, read(path))] == []
