"""The first day on a GPU: every command of docs/engines, one after the other, and one archive with all results.

    python bench/first_day.py MODEL OUTPUT [--engine trt] [--slots 2048 24064] [-- OPTIONS of the main job]

    doctor ─► for each number of slots: the main job ─► build ─► accept ─► bench ─► generate ─► OUTPUT/first-day.tar.gz

A command that fails does not end the day: the later ones run if they can, and each is recorded. OUTPUT/SLOTS may be a
run from another machine; then the main job is left out, which alone needs torch, model and text. A model with fewer
positions than slots is exported with as many slots as it has positions.

The archive has first-day.json, what each command said, and the results of the runs: no weights and no engines. It names
paths of the machine.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "nbl_export")
JOB = ("--layers", "8")  # in closed form, within minutes
BEYOND = re.compile(r"is beyond the model's (\d+) positions")
KEPT = ("*.json", "report.*", "engine/*/engine.json")  # of a run


class Day:
    """What ran, in order, written after each command."""

    def __init__(self, output: Path) -> None:
        self.output, self.steps = output, list[dict[str, Any]]()
        (output / "logs").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, words: Sequence[object], *, program: Sequence[str] = ()) -> tuple[bool, str]:
        """Run a command; returns whether it succeeded, and all that it said."""
        command = [*(program or COMMAND), *map(str, words)]
        print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
        started, log = time.time(), self.output / "logs" / f"{len(self.steps):02}-{name}.txt"
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            status, said = done.returncode, done.stdout.decode(errors="replace")
        except OSError as error:
            status, said = 127, str(error)
        log.write_text(said, encoding="utf-8")
        seconds = round(time.time() - started, 1)
        self.steps.append({"step": name, "command": command, "status": status, "seconds": seconds, "log": log.name})
        (self.output / "first-day.json").write_text(json.dumps(self.steps, indent=1), encoding="utf-8")
        print(f"  {name}: status {status} after {seconds} s: {said.strip()[-300:]}", file=sys.stderr, flush=True)
        return status == 0, said

    def pack(self) -> Path:
        """Write the archive."""
        archive = self.output / "first-day.tar.gz"
        found = [self.output / "first-day.json", *sorted((self.output / "logs").iterdir())]
        for run in sorted(path.parent for path in self.output.glob("*/nbl.json")):
            found += [path for kind in KEPT for path in sorted(run.glob(kind))]
        with tarfile.open(archive, "w:gz") as tar:
            for path in found:
                tar.add(path, path.relative_to(self.output))
        return archive


def exported(day: Day, model: str, engine: str, slots: int, job: Sequence[str]) -> Path | None:
    """The run of so many slots, or of as many as the model has positions; None if it has no graphs."""
    run = day.output / str(slots)
    if not (run / "nbl.json").is_file():
        words = ["--model", model, "--engine", engine, *job, "--max-seq-len", slots, "--output", run]
        good, said = day.run(f"job-{slots}", words)
        if not good and (beyond := BEYOND.search(said)):
            return exported(day, model, engine, int(beyond.group(1)), job)
    return run if (run / "nbl.json").is_file() else None


def checked(day: Day, run: Path, engine: str) -> Iterator[bool]:
    """Build, check, measure and use the engines of a run."""
    name = run.name
    built, _ = day.run(f"build-{name}", ["build", run, "--engine", engine])
    yield built
    if built:
        yield day.run(f"accept-{name}", ["accept", run])[0]
        yield day.run(f"bench-{name}", ["bench", run])[0]
        yield day.run(f"generate-{name}", ["generate", run, "The capital of France is", "--max-new-tokens", "32"])[0]
        yield day.run(f"report-{name}", ["report", run])[0]


def main(words: Sequence[str] | None = None) -> int:
    """Run the day; returns 0 if every command succeeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--engine", default="trt")
    parser.add_argument("--slots", type=int, nargs="+", default=[2048, 24_064])
    given = list(sys.argv[1:] if words is None else words)
    exit_layer = given.index("--") if "--" in given else len(given)
    options, job = parser.parse_args(given[:exit_layer]), given[exit_layer + 1 :] or JOB
    day = Day(options.output)
    day.run("nvidia-smi", ["-q"], program=["nvidia-smi"])
    good = [day.run("doctor", ["doctor"])[0]]
    runs: list[Path] = []
    for slots in options.slots:
        run = exported(day, options.model, options.engine, slots, job)
        good.append(run is not None)
        if run is not None and run not in runs:
            runs.append(run)
            good += checked(day, run, options.engine)
    if len(runs) > 1:
        good.append(day.run("compare", ["bench", *runs])[0])
    print(day.pack())
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
