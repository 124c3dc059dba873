"""Runs the ladder of `verify` for a job with a torch model: probes, `climb`, the price."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.climb import Climb, coded_graphs
from nbl_export.held_back import uses_of
from nbl_export.job import Job
from nbl_export.nbl_checkpoint import GIVEN_FIT
from nbl_export.price import price, spoken_price, warn_of_far_prices
from nbl_export.records import AffineMap, RungResult

__all__ = ["conclude", "make_probe", "price_texts", "run"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_LONG_TOKENS = 2048
_BEYOND_WINDOW = 512
_LONGEST_PROBED_WINDOW = 256  # by the short rows and as a batch; the long row is longer than any window


def run(job: Job) -> dict[str, Any]:
    """The value of verify.json."""
    from nbl_export.plan import load_maps
    from nbl_export.token_rows import rows_of

    maps = load_maps(job.run.path / "maps.safetensors", job.plan.replaced)
    results: list[RungResult] = []
    rows_VD = rows_of(job, maps)
    with _graphs(job, maps, rows_VD, results) as directories, coded_graphs(job, directories, results) as coded:
        climb = Climb(job, make_probe(job), maps, rows_VD, results)
        climb.ask_torch(coded)
        decoders = climb.run(directories, coded)
        prices = []
        if job.options.fit != GIVEN_FIT:  # whose original has no attention in the replaced layers
            with job.ui.task("price on held-back text") as progress:
                prices = price(decoders["original"], decoders["nbl"], price_texts(job), progress)
    return conclude(job, results, prices)


def conclude(job: Job, results: list[RungResult], prices: list[dict[str, Any]]) -> dict[str, Any]:
    """The value of verify.json from rungs and prices; says so where the price is far off."""
    from nbl_export import verify, verify_words

    plan, size = job.plan, job.engine.CAPABILITIES.cache_itemsize(job.options.precision)
    layers = {"original": plan.num_layers, "nbl": len(plan.kept)}
    per_token = {subject: job.spec.cache_bytes_per_token(kept, size) for subject, kept in layers.items()}
    warning = warn_of_far_prices(prices)
    for row in prices:
        said = spoken_price(row)["increase"]
        job.ui.say(f"  perplexity {said}, {row['text']}, {row['tokens']:,} tokens")
    if warning:
        job.ui.say(f"  {warning}")
    found = verify.summary(results, job.options.precision, prices, plan)
    texts = uses_of(job) if prices else []
    reference = "the linearized torch model" if job.graph is None else "the graph as it came, with the maps in numpy,"
    proof = verify_words.proof(results, reference)
    return {**found, "proof": proof, "price_warning": warning, "texts": texts, "cache_bytes_per_token": per_token}


@contextlib.contextmanager
def _graphs(
    job: Job, maps: Mapping[int, AffineMap], rows_VD: Any, results: list[RungResult]
) -> Iterator[dict[str, Path]]:
    """Directories of the graphs to compare: what ships, or its float32 twins after the two were found equal."""
    if not job.engine.CAPABILITIES.static:
        yield {"original": job.run.path / "original", "nbl": job.run.path / "model"}
        return
    from nbl_export.twins import build_twins, check_shipped

    with job.run.scratch() as scratch, job.ui.task("fp32 twins"):
        twins = build_twins(job, maps, rows_VD, scratch)
        results += check_shipped(job, twins)
        yield twins


def make_probe(job: Job) -> Any:
    """Rows and prompts from held-back text, and one long row that begins there and may go on with calibration text.

    A short row is longer than a small sliding window where there is one, the long row than any.
    """
    from nbl_export import verify

    windows, held = job.windows
    ids = held.flatten().tolist()
    window = job.spec.sliding_window or 0
    first, second = _PREFILL_TOKENS
    if 0 < window <= _LONGEST_PROBED_WINDOW:
        first = window + 24
    first, second = (min(n, job.slots - verify.DECODE_STEPS, len(ids) // 2) for n in (first, second))
    rows = (ids[: first + verify.DECODE_STEPS], ids[-(second + verify.DECODE_STEPS) :])
    starts = [k * len(ids) // 4 for k in (0, 1, 2)]
    new_tokens = min(_NEW_TOKENS, job.slots - _PROMPT_TOKENS)
    prompts = tuple(tuple(ids[s : s + _PROMPT_TOKENS]) for s in starts)
    long = [*ids, *windows.flatten().tolist()][: min(_long_tokens(job), job.slots)]
    return verify.Probe(tuple(map(tuple, rows)), prompts, new_tokens, tuple(long) if len(long) > len(rows[0]) else ())


def _long_tokens(job: Job) -> int:
    from nbl_export import verify

    window = job.spec.sliding_window
    return max(_LONG_TOKENS, window + _BEYOND_WINDOW if window else 0) + verify.DECODE_STEPS


def price_texts(job: Job) -> list[tuple[str, Any]]:
    """Windows that chose nothing, of the calibration text and of a text that nobody calibrates on, as arrays; cut to
    what a sequence can hold."""
    context = min(job.options.context, job.slots)
    return [(name, _cut(windows.numpy(), context)) for name, windows in job.texts("final")]


def _cut(windows_WT: Any, context: int) -> Any:
    ids = windows_WT.reshape(-1)
    return ids[: len(ids) // context * context].reshape(-1, context)
