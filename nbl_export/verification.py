"""Runs the ladder of `verify` for a job: held-back probes, torch's answers, then both graphs, one at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.held_back import uses_of
from nbl_export.job import Job
from nbl_export.nbl_checkpoint import GIVEN_FIT
from nbl_export.price import price, spoken_price, warn_of_far_prices
from nbl_export.records import ITEMSIZE, AffineMap, RungResult

__all__ = ["conclude", "make_probe", "measured_cache", "price_texts", "run"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_LONGEST_PROBED_WINDOW = 1024


def run(job: Job) -> dict[str, Any]:
    """The value of verify.json."""
    from nbl_export import verify_file, verify_last
    from nbl_export.linearize import linearize
    from nbl_export.plan import load_maps
    from nbl_export.reference import make_reference
    from nbl_export.token_rows import rows_of
    from nbl_export.twins import INT4

    plan = job.plan
    probe = make_probe(job)
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    with job.ui.task("torch reference") as progress:
        original = make_reference(job.model, probe.rows, probe.prompts, probe.new_tokens)
        progress(1, 2)
        nbl = make_reference(linearize(job.model, maps, plan.tap), probe.rows, probe.prompts, probe.new_tokens)
    del job.model  # it has been linearized, and memory is wanted
    capabilities = job.engine.CAPABILITIES
    precision = "fp32" if capabilities.static else job.options.precision  # of what is compared
    results: list[RungResult] = []
    yardsticks: dict[str, float] = {}
    decoders = {}
    rows_VD = rows_of(job, maps)
    with _graphs(job, maps, rows_VD, results) as directories:
        for subject, reference in (("original", original), ("nbl", nbl)):
            directory = directories[subject]
            decoder = decoders[subject] = job.engine.open_graph(directory, job.spec)
            cache = next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values."))
            ids, size = _cache_ids(job, subject), ITEMSIZE[cache.dtype]
            with _shipped(job, directory, decoder) as shipped:
                contract, logits = shipped.contract, job.options.kept_logits
                results += verify_file.check_file(subject, directory, job.spec, ids, contract, size, logits)
                ours = ({}, None) if subject == "original" else (maps, rows_VD)
                results += verify_file.check_maps(subject, directory, *ours)
                if shipped is not decoder:
                    results.append(verify_last.check_pruned(subject, directory))
                    results += verify_last.check_last(subject, decoder, shipped, probe.rows[0], precision)
            rung = "b" if subject == "original" else "c"
            results += _logits(rung, subject, decoder, probe, reference, precision, yardsticks)
            results.append(measured_cache(subject, decoder, len(probe.rows), job))
            if (directory / INT4).is_dir():
                decoder = decoders[subject] = job.engine.open_graph(directory / INT4, job.spec)
                results += _logits(rung, subject, decoder, probe, reference, "int4", yardsticks)
            results.append(_greedy(job, subject, directory, probe, reference, precision))
        results += verify_file.check_untouched(directories["nbl"], directories["original"])
        prices = []
        if job.options.fit != GIVEN_FIT:  # whose original has no attention in the replaced layers
            with job.ui.task("price on held-back text") as progress:
                prices = price(decoders["original"], decoders["nbl"], price_texts(job), progress)
    return conclude(job, results, prices)


def conclude(job: Job, results: list[RungResult], prices: list[dict[str, Any]]) -> dict[str, Any]:
    """The value of verify.json from rungs and prices; says so where the price is far off."""
    from nbl_export import verify

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
    return {**found, "price_warning": warning, "texts": texts, "cache_bytes_per_token": per_token}


def _logits(
    rung: str, subject: str, decoder: Any, probe: Any, reference: Any, precision: str, yardsticks: dict[str, float]
) -> list[RungResult]:
    """Rung b or c; the first graph of a precision is the yardstick of the second."""
    from nbl_export import verify

    found = verify.check_logits(
        rung, subject, decoder, probe.rows, reference.logits, reference.noise, precision, yardsticks.get(precision)
    )
    yardsticks.setdefault(precision, max(r.value or 0.0 for r in found))
    return found


@contextlib.contextmanager
def _shipped(job: Job, directory: Path, decoder: Any) -> Iterator[Any]:
    """The graph that ships: the one with the logits of the last token where there is one, else `decoder` itself."""
    from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, GRAPH_FILE

    pair = (directory / ALL_LOGITS_FILE).is_file()
    yield job.engine.open_graph(directory, job.spec, GRAPH_FILE) if pair else decoder


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


def _cache_ids(job: Job, subject: str) -> tuple[int, ...]:
    """Layers that keep a cache, or ids 0..K-1 where the graph counts so."""
    kept = job.plan.kept if subject == "nbl" else tuple(range(job.plan.num_layers))
    return tuple(range(len(kept))) if job.engine.CAPABILITIES.dense_caches else kept


def make_probe(job: Job) -> Any:
    """Rows and prompts from held-back text; a row longer than a small sliding window where there is one."""
    from nbl_export import verify

    _, held = job.windows
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
    return verify.Probe(tuple(map(tuple, rows)), prompts, new_tokens)


def measured_cache(subject: str, decoder: Any, rows: int, job: Job) -> RungResult:
    per_token = decoder.cache_bytes // (rows * decoder.slots)
    stated = decoder.contract.cache_bytes_per_token(job.spec.head_dim)
    passed = per_token == stated
    detail = f"{per_token} bytes a token held after the last step, {stated} by contract"
    return RungResult("a", subject, "cache bytes in the running session", float(not passed), 0.5, passed, detail)


def _greedy(job: Job, subject: str, directory: Path, probe: Any, reference: Any, precision: str) -> RungResult:
    from nbl_export import verify

    with job.engine.open_checked(directory, job.options.first_threads) as runner:
        said = [runner.greedy(prompt, probe.new_tokens) for prompt in probe.prompts]
    return verify.check_greedy(subject, said, reference.greedy, reference.margins, precision)


def price_texts(job: Job) -> list[tuple[str, Any]]:
    """Windows that chose nothing, of the calibration text and of a text that nobody calibrates on, as arrays; cut to
    what a sequence can hold."""
    context = min(job.options.context, job.slots)
    return [(name, _cut(windows.numpy(), context)) for name, windows in job.texts("final")]


def _cut(windows_WT: Any, context: int) -> Any:
    ids = windows_WT.reshape(-1)
    return ids[: len(ids) // context * context].reshape(-1, context)
