"""The lossless stage: the original decoder with a proposer of tokens, checked and timed.

original/ ─► target ┐
int4 decoder ───────┼─► lossless/ ─► tokens equal, times ─► the fastest proposer ─► lossless.json
NBL int4 decoder ───┘
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import ParityError
from nbl_export.files import write_json
from nbl_export.graph.names import MANIFEST
from nbl_export.measure.lossless import (
    Sample,
    Way,
    best_of_each,
    time_ways,
)
from nbl_export.options.options import GGUF
from nbl_export.records.proposers import AUTO, Proposer, proposers_of
from nbl_export.records.results import RungResult
from nbl_export.run.job import Job
from nbl_export.run.lossless.drafts import add_drafts, codes_for_drafts
from nbl_export.run.lossless.figures import (
    LOADS,
    NEW_TOKENS,
    asked_of,
    measured,
    spoken,
)
from nbl_export.run_directory import LOSSLESS_FILE
from nbl_export.targets.runners import Draft
from nbl_export.text.prompts import prompts

__all__ = ["run"]

_CHECKED_TOKENS = 80

Blocks = Mapping[str, Mapping[str, Any]]  # name of a draft -> its block of genai_config.json


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write lossless/ and lossless.json."""

    own = job.options.precision == "int4" or (job.options.precision == GGUF and codes_for_drafts(job) is not None)
    if job.options.draft == "int4" and own:
        job.ui.say("  an int4 draft of an int4 decoder proposes at the decoder's own cost; it cannot make it faster")
    target = out / "lossless"
    job.engine.write_target(job.run.path / "original", target)
    blocks = add_drafts(job, target)
    rungs = _check_graph(job, target)
    trial, samples = _timed(job, target, blocks)
    found = _judged(job, [*trial, *samples], rungs)
    result = {**measured(job.options.draft or AUTO, job.options.precision, trial, samples), **found}
    chosen = next(p for p in _asked(job) if p.name == result["chosen"]["name"])
    job.engine.settle(target, chosen, blocks)
    write_json(target / MANIFEST, {**_facts(job), "lossless": result["chosen"]})
    write_json(out / LOSSLESS_FILE, result)
    job.ui.say(f"  {spoken(result)}")
    return {}


def _facts(job: Job) -> dict[str, Any]:
    from nbl_export.options.places import public_facts

    kept = ("schema", "model", "decoder", "options", "logits")
    return public_facts({k: job.run.manifest[k] for k in kept if k in job.run.manifest}, job.run.manifest)


# -- checks and times ----------------------------------------------------------------------------------------


def _check_graph(job: Job, target: Path) -> list[RungResult]:
    """Rung f of an ONNX graph; the IR is the graph with all logits, byte for byte."""
    from nbl_export.graph.names import GRAPH_FILE
    from nbl_export.verify.last_token import check_last_rows

    if job.engine.capabilities.graphs != "onnx":
        return []
    every = job.engine.open_graph(job.run.path / "original", job.spec.head_dim)
    last = job.engine.open_graph(target, job.spec.head_dim, GRAPH_FILE)
    with _plain(job) as runner:
        ids = runner.encode(" ".join(p.text for p in prompts(2)), chat=False)[:_CHECKED_TOKENS]
    return [check_last_rows(every, last, ids, job.options.precision)]


def _plain(job: Job) -> Any:
    """A runner of plain decoding."""
    return job.engine.open_lossless(job.run.path / "original", job.options.first_threads)


def _timed(job: Job, target: Path, blocks: Blocks) -> tuple[list[Sample], list[Sample]]:
    """The trial of all proposers, and the rounds of the fastest of each draft."""
    openers: dict[str, Callable[[], Any]] = {"original": functools.partial(_plain, job)}
    for name in ("ngram", *blocks):
        draft = Draft(name, blocks.get(name, {}))
        openers[name] = functools.partial(job.engine.open_lossless, target, job.options.first_threads, draft)
    ways = [Way(None, "original"), *(Way(p, p.draft) for p in _asked(job) if p.draft in openers)]
    with _plain(job) as runner:
        loads = asked_of(runner, job.slots - NEW_TOKENS, LOADS + 1)
    with job.ui.task("proposers") as progress:
        trial = time_ways(ways, openers, {0: loads[0]}, NEW_TOKENS, progress)
    with job.ui.task("lossless rounds") as progress:
        rest = {load: loads[load] for load in range(1, LOADS + 1)}
        return trial, time_ways(best_of_each(trial), openers, rest, NEW_TOKENS, progress)


def _asked(job: Job) -> tuple[Proposer, ...]:
    return proposers_of(str(job.options.draft), job.engine.capabilities.proposers)


def _judged(job: Job, samples: Sequence[Sample], rungs: list[RungResult]) -> dict[str, Any]:
    """Where answers differ, and the verdict on graph and tokens.

    Raises:
        ParityError: the folder does not give the original's tokens.
    """
    from dataclasses import asdict

    from nbl_export.run.lossless.tokens import check_tokens, first_differences, margin

    with job.engine.open_runner(job.run.path / "original", job.options.first_threads) as runner:
        differences = first_differences(samples, functools.partial(margin, runner))
    found = [*rungs, check_tokens(samples, differences, job.options.precision)]
    for rung in found:
        if not rung.passed:
            raise ParityError(f"lossless decoding is not the original's: {rung.metric}: {rung.value} ({rung.detail})")
    return {"rungs": [asdict(rung) for rung in found], "differences": differences}
