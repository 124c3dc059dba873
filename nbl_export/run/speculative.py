"""Figures of lossless decoding: the prompts, the tokens that must be equal, the times, and `bench DIR --lossless`.

Are the greedy tokens the original's? Two chunk lengths take different kernels, so logits differ by rounding, and
near-ties fall either way. A difference passes if the original's two best logits are closer there than the precision's
`greedy_margin`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, UsageError
from nbl_export.measure.benchmark import where_measured
from nbl_export.measure.speculative import PLAIN, Asked, Sample, decoding, equal_answers, overall, rows
from nbl_export.options.options import JobOptions
from nbl_export.options.settle import flag_of
from nbl_export.records.capabilities import MOST_ROWS, Proposer
from nbl_export.records.results import CheckResult
from nbl_export.run.deployed import available_engine, locate
from nbl_export.run.progress import Ui
from nbl_export.run_directory import DECODERS, LOSSLESS_FILE, SUBJECTS, RunDirectory
from nbl_export.text.prompts import MOST_EACH, prompts
from nbl_export.verify.ladder import TOLERANCES

__all__ = [
    "LOADS", "NEW_TOKENS", "asked_of", "bench_speculative", "check_tokens", "first_differences", "margin", "measured",
    "spoken",
]  # fmt: skip

NEW_TOKENS = 64
LOADS = 5  # after the trial, which is load 0
_MOST_PROMPT_TOKENS = 512


def asked_of(runner: Any, most: int, loads_wanted: int) -> list[list[Asked]]:
    """The prompts of each load, one of each kind, as token ids of at most `most` tokens, and of 512."""
    loads: list[list[Asked]] = [[] for _ in range(loads_wanted)]
    counts: dict[str, int] = {}
    for prompt in prompts(loads_wanted):
        number = counts[prompt.kind] = counts.get(prompt.kind, -1) + 1
        ids = runner.encode(prompt.text, chat=prompt.chat)
        loads[number].append(Asked(prompt.kind, number, tuple(ids[: min(most, _MOST_PROMPT_TOKENS)])))
    return loads


def measured(draft: str, precision: str, trial: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of lossless.json: the trial, the rows, and the fastest proposer.

    `pays` says whether the fastest proposer is faster than plain decoding, by its whole interval.
    """
    best = sorted(overall(samples), key=lambda row: -row["ratio"])
    chosen = _named(samples, best[0]["proposer"])
    return {
        "asked": draft,
        "precision": precision,
        "chosen": chosen.to_json(),
        "pays": best[0]["verdict"] == "faster",
        "new_tokens": NEW_TOKENS,
        "verified_positions": MOST_ROWS,
        "trial": [{"proposer": row["proposer"], "ratio": row["ratio"]} for row in overall(trial)],
        "overall": best,
        "rows": rows(samples),
        **where_measured(),
    }


def _named(samples: Sequence[Sample], name: str) -> Proposer:
    return next(s.way.proposer for s in samples if s.way.proposer is not None and s.way.name == name)


def spoken(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence."""
    best = result["overall"][0]
    interval = f"×{best['ratio']:.2f} ({best['low']:.2f} to {best['high']:.2f})"
    kind, equal = decoding(result["precision"]), f"{equal_answers(best)} equal"
    if result["pays"]:
        return f"{kind} with {best['proposer']}: {interval} of plain decoding, {equal}"
    return f"{kind} does not pay here: the fastest, {best['proposer']}, is {interval} of plain decoding, {equal}"


# -- equal tokens -----------------------------------------------------------------------------------------------


def first_differences(samples: Sequence[Sample], margin_of: Callable[[Sequence[int]], float]) -> list[dict[str, Any]]:
    """Where answers leave the plain ones, and how close the original's two best logits are there.

    Args:
        margin_of: token ids -> the difference of the original's two best logits behind them.
    """
    plain = {(s.load, s.asked): s.found.tokens for s in samples if s.way.name == PLAIN}
    found = []
    for sample in samples:
        ours, theirs = sample.found.tokens, plain[sample.load, sample.asked]
        if ours == theirs:
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        margin = margin_of([*sample.asked.ids, *theirs[:at]])
        where = {"kind": sample.asked.kind, "prompt": sample.asked.number, "token": at, "of": len(theirs)}
        found.append({"proposer": sample.way.name, **where, "margin": margin})
    return found


def check_tokens(samples: Sequence[Sample], differences: Sequence[dict[str, Any]], precision: str) -> CheckResult:
    """Whether all greedy tokens are the original's, near-ties aside."""
    allowed = TOLERANCES[precision].greedy_margin
    answers = sum(s.way.name != PLAIN for s in samples)
    worst = max((d["margin"] for d in differences), default=0.0)
    detail = f"{answers - len(differences)} of {answers} answers are equal"
    if differences:
        detail += f"; the others differ first where two logits are at most {worst:.2g} apart"
    metric = "greedy tokens of the original: largest margin at a difference"
    return CheckResult("text", "lossless", metric, worst, allowed, worst <= allowed, detail)


def margin(runner: Any, ids: Sequence[int]) -> float:
    """The difference of a decoder's two best logits behind some tokens."""
    runner.begin(len(ids))
    runner.append(ids)
    second, first = np.partition(runner.last_logits(), -2)[-2:]
    return float(first - second)


# -- bench DIR --lossless ---------------------------------------------------------------------------------------


def bench_speculative(directory: Path, asked: Mapping[str, Any], ui: Ui) -> dict[str, Any]:
    """The figures of lossless.json for the chosen proposer, measured again; nothing is written.

    Args:
        asked: threads and repetitions, by the field names of JobOptions.

    Raises:
        UsageError: another option, or more than one number of threads. NblError: the run has no lossless/.
    """
    from nbl_export.measure.speculative import Way, time_ways

    options = JobOptions("", **asked)
    if options.batches != (1,):
        raise UsageError("--lossless is for one sequence: no runtime proposes tokens in a batch here")
    for name in sorted(set(asked) - {"threads", "repetitions"}):
        raise UsageError(f"{flag_of(name)} has no effect on --lossless, whose prompts are fixed; leave it out")
    if len(options.threads or ()) > 1:
        raise UsageError("--lossless measures one setting; give --threads one number")
    if (options.repetitions or 0) > MOST_EACH:
        raise UsageError(f"--repetitions is {MOST_EACH} at most with --lossless: every round has prompts of its own")
    folder, original = locate(directory, SUBJECTS["lossless"].directory), locate(directory, DECODERS["original"])
    engine = available_engine(folder)
    run = RunDirectory.peek(directory)
    name, precision = run.read_json(LOSSLESS_FILE)["chosen"]["name"], run.manifest["options"]["precision"]
    chosen = next((p for p in engine.capabilities.proposers if p.name == name), None)
    if chosen is None:
        raise NblError(f"{directory / LOSSLESS_FILE} names no known proposer; run its stage again")
    threads = options.first_threads
    openers = {p.path.name: functools.partial(engine.open_speculative, p.path, threads) for p in (original, folder)}
    ways = [Way(None, original.path.name), Way(chosen, folder.path.name)]
    with openers[original.path.name]() as runner:
        loads = asked_of(runner, runner.most_tokens - NEW_TOKENS, options.repetitions or LOADS)
    with ui.task("lossless rounds") as progress:
        samples = time_ways(ways, openers, dict(enumerate(loads)), NEW_TOKENS, progress)
    return measured(chosen.draft, precision, [], samples)
