"""Runs the ladder of `verify` for a job: held-back probes, torch's answers, then both graphs, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.job import Job
from nbl_export.records import ITEMSIZE, RungResult

__all__ = ["run"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_PRICE_TOKENS = 2048
_LONGEST_PROBED_WINDOW = 1024


def run(job: Job) -> dict[str, Any]:
    """The value of verify.json."""
    from nbl_export import verify, verify_file
    from nbl_export.linearize import linearize
    from nbl_export.plan import load_maps
    from nbl_export.reference import make_reference

    plan = job.plan
    probe = _probe(job)
    maps = load_maps(job.run.path / "maps.safetensors", plan.replaced)
    with job.ui.task("torch reference") as progress:
        original = make_reference(job.model, probe.rows, probe.prompts, probe.new_tokens)
        progress(1, 2)
        nbl = make_reference(linearize(job.model, maps), probe.rows, probe.prompts, probe.new_tokens)
    del job.model  # it has been linearized, and memory is wanted
    graphs = {
        "original": (job.run.path / "original", tuple(range(plan.num_layers)), original),
        "nbl": (job.run.path / "model", plan.kept, nbl),
    }
    results: list[RungResult] = []
    yardstick = None
    decoders = {}
    per_token = {}
    for subject, (directory, kept, reference) in graphs.items():
        decoder = decoders[subject] = job.engine.open_graph(directory, job.spec)
        cache = next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values."))
        results += verify_file.check_file(subject, directory, job.spec, kept, decoder.contract, ITEMSIZE[cache.dtype])
        results += verify_file.check_maps(subject, directory, {} if subject == "original" else maps)
        rung = "b" if subject == "original" else "c"
        found = verify.check_logits(
            rung, subject, decoder, probe.rows, reference.logits, reference.noise, job.options.precision, yardstick
        )
        yardstick = max(r.value or 0.0 for r in found) if yardstick is None else yardstick
        per_token[subject] = decoder.cache_bytes // (len(probe.rows) * max(map(len, probe.rows)))
        results += [*found, _measured_cache(subject, decoder, per_token[subject], job)]
        results.append(_greedy(job, subject, directory, probe, reference))
    results += verify_file.check_untouched(job.run.path / "model", job.run.path / "original")
    with job.ui.task("price on held-back text") as progress:
        prices = verify.price(decoders["original"], decoders["nbl"], _price_texts(job), progress)
    return {**verify.summary(results, job.options.precision, prices, plan), "cache_bytes_per_token": per_token}


def _probe(job: Job) -> Any:
    """Rows and prompts from held-back text; a row longer than a small sliding window where there is one."""
    from nbl_export import verify

    _, held = job.windows
    ids = held.flatten().tolist()
    window = job.spec.sliding_window or 0
    first, second = _PREFILL_TOKENS
    if 0 < window <= _LONGEST_PROBED_WINDOW:
        first = window + 24
    first, second = (min(n, job.spec.max_positions - verify.DECODE_STEPS, len(ids) // 2) for n in (first, second))
    rows = (ids[: first + verify.DECODE_STEPS], ids[-(second + verify.DECODE_STEPS) :])
    starts = [k * len(ids) // 4 for k in (0, 1, 2)]
    new_tokens = min(_NEW_TOKENS, job.spec.max_positions - _PROMPT_TOKENS)
    prompts = tuple(tuple(ids[s : s + _PROMPT_TOKENS]) for s in starts)
    return verify.Probe(tuple(map(tuple, rows)), prompts, new_tokens)


def _measured_cache(subject: str, decoder: Any, per_token: int, job: Job) -> RungResult:
    stated = decoder.contract.cache_bytes_per_token(job.spec.head_dim)
    passed = per_token == stated
    detail = f"{per_token} bytes a token held after the last step, {stated} by contract"
    return RungResult("a", subject, "cache bytes in the running session", float(not passed), 0.5, passed, detail)


def _greedy(job: Job, subject: str, directory: Path, probe: Any, reference: Any) -> RungResult:
    from nbl_export import verify

    with job.engine.open_runner(directory, job.options.threads) as runner:
        said = [runner.greedy(prompt, probe.new_tokens) for prompt in probe.prompts]
    return verify.check_greedy(subject, said, reference.greedy, reference.margins, job.options.precision)


def _price_texts(job: Job) -> list[tuple[str, Any]]:
    """Held-back windows of the calibration text, and a text that nobody calibrates on."""
    from nbl_export import checkpoint, corpus

    _, held = job.windows
    context = job.options.context
    count = max(1, _PRICE_TOKENS // context)
    other = corpus.stdlib_text()
    tokenizer = checkpoint.load_tokenizer(job.checkpoint)
    windows, _ = corpus.pack(other, tokenizer, count * context, context)
    texts = [(f"held back from {job.text.name}", held[:count].numpy())]
    if other.sha256 != job.text.sha256:
        texts.append((f"{other.name} (not calibrated on)", windows[:count].numpy()))
    return texts
