"""Times the lossless/ folder of a run against its original/: `bench DIR --lossless`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.options.options import JobOptions
from nbl_export.options.settle import flag_of
from nbl_export.run.deployed import available_engine, locate
from nbl_export.run.lossless.figures import (
    LOADS,
    NEW_TOKENS,
    asked_of,
    measured,
)
from nbl_export.run.progress import Ui
from nbl_export.run_directory import LOSSLESS_FILE, RunDirectory
from nbl_export.text.prompts import MOST_EACH

__all__ = ["bench_lossless"]


def bench_lossless(directory: Path, asked: Mapping[str, Any], ui: Ui) -> dict[str, Any]:
    """The figures of lossless.json for the chosen proposer, measured again; nothing is written.

    Args:
        asked: threads and repetitions, by the field names of JobOptions.

    Raises:
        UsageError: another option, or more than one number of threads. NblError: the run has no lossless/.
    """
    from nbl_export.measure.lossless import Way, time_ways

    options = JobOptions("", **asked)
    if options.batches != (1,):
        raise UsageError("--lossless is for one sequence: no runtime proposes tokens in a batch here")
    for name in sorted(set(asked) - {"threads", "repetitions"}):
        raise UsageError(f"{flag_of(name)} has no effect on --lossless, whose prompts are fixed; leave it out")
    if len(options.threads or ()) > 1:
        raise UsageError("--lossless measures one setting; give --threads one number")
    if (options.repetitions or 0) > MOST_EACH:
        raise UsageError(f"--repetitions is {MOST_EACH} at most with --lossless: every round has prompts of its own")
    folder, original = locate(directory, "lossless"), locate(directory, "original")
    engine = available_engine(folder)
    run = RunDirectory.peek(directory)
    name, precision = run.read_json(LOSSLESS_FILE)["chosen"]["name"], run.manifest["options"]["precision"]
    chosen = next((p for p in engine.capabilities.proposers if p.name == name), None)
    if chosen is None:
        raise NblError(f"{directory / LOSSLESS_FILE} names no known proposer; run its stage again")
    threads = options.first_threads
    openers = {p.path.name: functools.partial(engine.open_lossless, p.path, threads) for p in (original, folder)}
    ways = [Way(None, original.path.name), Way(chosen, folder.path.name)]
    with openers[original.path.name]() as runner:
        loads = asked_of(runner, runner.most_tokens - NEW_TOKENS, options.repetitions or LOADS)
    with ui.task("lossless rounds") as progress:
        samples = time_ways(ways, openers, dict(enumerate(loads)), NEW_TOKENS, progress)
    return measured(chosen.draft, precision, [], samples)
