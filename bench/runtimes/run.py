"""Which runtimes load a run's model folder and say what the run's own runner says.

    DIR/model/ ── GenaiRunner ── prompt ids, greedy tokens: the reference
              └── each row of rows.py in a process of its own ── its tokens ── equal, different, failed, not run

python bench/runtimes/run.py DIR [--only NAME ...] [--optimum-python PYTHON] [--screenshot FILE.png] > table.json

JSON on stdout: runtime, version, what it was given, result. Exit status 1 if a runtime that is here failed or differed.
Both sequences end with the first end-of-text id, where there is one: some runtimes stop there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layout import lay_out
from rows import ROWS, Missing, Place, Row

__all__ = ["Reference", "judge", "reference_of", "table"]

PROMPT = "Write two sentences about the sea."
EQUAL = "equal tokens"
LIMIT_S = 1800  # a loaded machine compiles and copies half a gigabyte into a browser


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the run's own runner makes of the prompt."""

    prompt: str
    chat: bool
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    end_ids: tuple[int, ...]
    new_tokens: int


def reference_of(model: Path, new_tokens: int, prompt: str = PROMPT) -> Reference:
    """Greedy continuation by nbl_export's runner, through the chat template where the folder has one."""
    from nbl_export.targets.onnx.genai import GenaiRunner

    chat = (model / "chat_template.jinja").is_file()
    with GenaiRunner(model) as runner:
        ids = runner.encode(prompt, chat=chat)
        tokens = _to_end(runner.greedy(ids, new_tokens), runner.settings.end_ids)
        text = "".join(runner.stream(ids, new_tokens))
        return Reference(prompt, chat, tuple(ids), tuple(tokens), text, runner.settings.end_ids, new_tokens)


def _to_end(tokens: Sequence[int], end_ids: Sequence[int]) -> list[int]:
    """Up to and with the first end-of-text id."""
    ends = [i for i, token in enumerate(tokens) if token in end_ids]
    return list(tokens[: ends[0] + 1] if ends else tokens)


def judge(reference: Reference, answer: Mapping[str, Any]) -> str:
    """`EQUAL`, or where the answer leaves the reference."""
    ids = answer.get("prompt_ids", reference.ids)
    if list(ids) != list(reference.ids):
        return f"differs: the prompt is {list(ids)} for its tokenizer, {list(reference.ids)} for the runner"
    tokens = _to_end(answer["tokens"], reference.end_ids)
    if tokens != list(reference.tokens):
        same = next((i for i, (a, b) in enumerate(zip(tokens, reference.tokens, strict=False)) if a != b), len(tokens))
        return f"differs: at token {same} of {len(reference.tokens)}, {tokens} for {list(reference.tokens)}"
    return EQUAL


def table(place: Place, reference: Reference, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Run every row; what is wrong with one does not stop the others."""
    asked = {"prompt": reference.prompt, "chat": reference.chat, "ids": list(reference.ids),
             "new_tokens": reference.new_tokens}  # fmt: skip
    found = []
    for row in rows:
        sys.stderr.write(f"{row.name} ...\n")
        version, result = _run(row, place, asked, reference)
        sys.stderr.write(f"{row.name}: {result}\n")
        found.append({"runtime": row.name, "version": version, "given": row.given, "result": result})
    return found


def _run(row: Row, place: Place, asked: dict[str, object], reference: Reference) -> tuple[str | None, str]:
    try:
        command = row.command(place, asked)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, **row.environment}
        )
    except Missing as reason:
        return None, f"not run: {reason}"
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"failed: {error}"
    if done.returncode:
        plain = re.sub(r"\x1b\[[\d;]*m", "", done.stderr)  # colours
        said = [line.strip() for line in plain.splitlines() if line.strip()]
        return None, "failed: " + (" | ".join(said[-8:]) or f"exit status {done.returncode}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return answer.get("version") or (row.version() if row.version else None), judge(reference, answer)


def _facts(model: Path) -> dict[str, Any]:
    path = model / "nbl.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = {"title": record.get("model", {}).get("title"), "precision": record.get("options", {}).get("precision")}
    return {**facts, "num_layers": record.get("num_layers"), "replaced_layers": record.get("replaced_layers")}


def _measured(model: Path, rows: Sequence[Row], given: argparse.Namespace) -> tuple[Reference, list[dict[str, Any]]]:
    reference = reference_of(model, given.new_tokens)
    with tempfile.TemporaryDirectory(prefix="nbl-export-runtimes-") as scratch:
        layout = lay_out(model, Path(scratch) / "layout")
        place = Place(model, layout, Path(scratch), given.optimum_python, given.screenshot)
        return reference, table(place, reference, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the top of this file."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("directory", type=Path, help="a run directory, or a model folder")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows whose name holds one of these")
    parser.add_argument("--optimum-python", metavar="PYTHON", help="an interpreter with optimum-onnx")
    parser.add_argument("--screenshot", type=Path, metavar="FILE.png", help="of the page that streams text")
    parser.add_argument("--new-tokens", type=int, default=24)
    given = parser.parse_args(arguments)
    from nbl_export.errors import NblError

    model = given.directory if (given.directory / "model.onnx").is_file() else given.directory / "model"
    rows = [row for row in ROWS if not given.only or any(part in row.name for part in given.only)]
    if not rows:
        parser.error(f"--only: no such row; there are {'; '.join(row.name for row in ROWS)}")
    try:
        reference, found = _measured(model, rows, given)
    except NblError as error:
        parser.error(str(error))
    facts = {"model": _facts(model), "reference": dataclasses.asdict(reference), "runtimes": found}
    sys.stdout.write(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return int(any(not row["result"].startswith((EQUAL, "not run")) for row in found))


if __name__ == "__main__":
    sys.exit(main())
