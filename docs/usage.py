"""Writes docs/usage.md and the table of docs/destinations.md.

python docs/usage.py            write all
python docs/usage.py --check    only say which one would change, and end with 1 if so
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("usage.md")
PLACES = PAGE.with_name("destinations.md")
HEAD = """# Usage

```
nbl-export --model MODEL --output DIR [options]     the main job
nbl-export COMMAND ...                              one part of it
```

The main job calibrates, chooses layers, rewrites the decoder, verifies it, measures it and writes a report.
The same command again resumes a run. Changed options repeat the stages that they affect.
An option that has no effect in a job is refused.

`--force` of the main job and of `calibrate` removes the run first and starts over.
`--force` of every other command keeps the run, and goes on although verification failed.

## Time, memory and disk

```
nbl-export estimate MODEL [options of the main job]
```

`estimate` says what a job takes on this machine: time, memory and disk of each stage.
It also says the method that the model gets, what limits its loss, and how much faster prompts are by counted work.
A model that takes no exit layer learns why. Milliseconds are measured by the job, not estimated.
Predicted KV are counted for a third of the layers, linear maps for the layers that are asked for, or a quarter.
A number of layers is taken from the middle of the model; the last layers gain more.
MODEL is a hub id, a checkpoint directory, a `config.json` or a GGUF file. No weight is read.
Of a model of the hub, `config.json` alone is fetched.
The main job says the same before it begins. It refuses if memory or disk cannot suffice.
A job that resumes counts the stages that are left.

| column | meaning |
|---|---|
| time | work over the speed of short matrix products, measured now; three quarters to four thirds of it |
| memory | the least that a stage can run with, beside Python and its libraries; a job is refused by this |
| disk | what the stage writes; float weights of a GGUF file are removed when the report is written |

A stage takes more memory than the least if more is free.
Other programs do not change the estimated speed. If they run now, the time beside them is told too.
The default jobs of 0.1B and 0.5B that were measured took a time within the range.
Stages of jobs in float32, and of 3B and 8B, agree within a factor of 2.
None took less memory than the estimate.
These jobs ran on ONNX Runtime. Estimates for OpenVINO follow from the same work and were not compared.
Engines for GPUs are built and timed in a time that is not estimated.

## Configuration file

`--config FILE` takes options from TOML or from another run's `nbl.json`. Flags win over the file.
The names are those of the options, with dashes or underscores.
Options that experiments need are keys: a file takes them, and they have no flag.
`calibrate`, `plan`, `rewrite`, `build`, `estimate` and `eval` take a file of their own options and keys.

```toml
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
layers = "7,9,15,25-29"
calibration = ["articles.jsonl", "code.txt"]
select = "cca"
```

In Python, options and keys are arguments. `max_perplexity_increase=0.05` is 5%.

## Exit status

| status | meaning |
|---|---|
| 0 | done |
| 1 | something that you can correct; the message says what |
| 2 | wrong usage |
| 3 | verification failed, or a check of `accept` |
| 130 | interrupted; finished stages are kept |
"""


def page() -> str:
    """The text of usage.md."""
    from nbl_export.cli.app import app

    options: list[Any] = app.params
    for option in options:
        option.hidden = False
    main = _rows(app, "nbl-export")
    commands = {name: _rows(command, f"nbl-export {name}") for name, command in app.commands.items()}
    times = Counter(row for rows in commands.values() for row in rows if row not in main)
    often = [row for row, count in times.items() if count > 2]
    lines = [HEAD, "## The main job", ""]
    panels = dict.fromkeys(row[0] for row in sorted(main, key=lambda row: row[0] != ""))
    lines += [*_TABLE, *(line for panel in panels for line in _panel(panel, main)), ""]
    lines += ["**Keys of `--config FILE`**", "", "| key | meaning |", "|---|---|", *_keys(), ""]
    lines += ["## Commands", "", "| command | what it does | options of several commands, and of the main job |"]
    lines += ["|---|---|---|"]
    for name, rows in commands.items():
        also = ", ".join(f"`{_flag(row)}`" for of in (often, main) for row in rows if row in of)
        lines.append(f"| `{name}` | {' '.join(str(app.commands[name].help).split())} | {also} |")
    lines += ["", "**Options of several commands**", "", *_TABLE, *_lines(often)]
    for name, rows in commands.items():
        own = [row for row in rows if row not in main and row not in often]
        lines += ["", f"## {name}", "", *_TABLE, *_lines(own)] if own else []
    return "\n".join(lines) + "\n"


def _rows(command: Any, name: str) -> list[tuple[str, str, str]]:
    """Panel, option and meaning of each option and argument of a command."""
    from nbl_export.cli.options import panel_of
    from nbl_export.options.options import PANELS

    context = command.make_context(name, [], resilient_parsing=True)
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or "--help" in parameter.opts:
            continue
        option, meaning = (" ".join(words.split()).replace("|", "\\|") for words in record)
        panel = panel_of(parameter)
        rows.append((panel if panel in PANELS else "", option, meaning))
    return rows


def _flag(row: tuple[str, str, str]) -> str:
    return row[1].split(", ")[-1].split(" ")[0]


_TABLE = ["| option | meaning |", "|---|---|"]


def _panel(panel: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
    return [*([f"| **{panel}** | |"] if panel else []), *_lines(row for row in rows if row[0] == panel)]


def _lines(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    return [f"| `{option}` | {meaning} |" for _, option, meaning in rows]


def _keys() -> Iterator[str]:
    from nbl_export.cli.options import describe_option
    from nbl_export.options.options import OPTIONS

    for name, record in OPTIONS.items():
        if record.key:
            commands = ", ".join(f"`{c}`" for c in record.commands if c != "main")
            also = f" Also of {commands}." if commands else ""
            yield f"| `{name}` | {describe_option(name, record)}{also} |"


def places() -> str:
    """The text of destinations.md, with today's table."""
    text = PLACES.read_text(encoding="utf-8")
    begin, end = "<!-- docs/usage.py -->\n", "<!-- /docs/usage.py -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}{_places()}{end}{rest.partition(end)[2]}"


def _places() -> str:
    from nbl_export.records.destinations import DESTINATIONS
    from nbl_export.targets import load_engine

    kinds = {"predicted_kv": "predicted KV", "linear": "linear layers"}
    lines = [f"| `--for` | program | {' | '.join(kinds.values())} | weights | models | take |", "|---|" + "---|" * 6]
    for name, place in DESTINATIONS.items():
        about = load_engine(place.engine or "ort", place.provider).capabilities
        held = [kind for kind in kinds if (about.holds(kind) if place.kinds is None else kind in place.kinds)]
        cells = ["yes" if kind in held else "no" for kind in kinds]
        folder = "`DIR/engine/model/`" if about.static else "`DIR/model/`"
        take = f"`convert --to {name}`" if place.form else folder
        models = ", ".join(place.architectures) or "those of the run"
        weights = place.weights or ", ".join(about.precisions)
        lines.append(" | ".join((f"| `{name}`", place.title, *cells, weights, models, f"{take} |")))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    written = {PAGE: page(), PLACES: places()}
    if "--check" in sys.argv:
        changed = [str(f) for f, text in written.items() if not f.is_file() or f.read_text(encoding="utf-8") != text]
        sys.exit(f"{' and '.join(changed)} would change" if changed else 0)
    for file, text in written.items():
        file.write_text(text, encoding="utf-8")
