"""The verify stage: runs the verification ladder (`verify.climb`) on probes, and measures the quality loss."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.files import versions, write_json
from nbl_export.graph.names import GENAI_CONFIG, all_logits_file
from nbl_export.mixers.base import Mixer
from nbl_export.options.options import GGUF, GIVEN_FIT
from nbl_export.records.results import RungResult
from nbl_export.run.facts import require_engine
from nbl_export.run.job import Job
from nbl_export.run.quantize.rescaled import check_rescaled, exported_maps, exported_model
from nbl_export.run.stages.common import rows_of
from nbl_export.run_directory import ACCEPTANCE_FILE, MAPS_FILE, PACKAGES, REFERENCES_FILE, VERIFY_FILE
from nbl_export.text.held_back import judging
from nbl_export.text.window_intervals import spoken_price
from nbl_export.verify.climb import Climb
from nbl_export.verify.codes import EXACT, NEAREST, SEARCHED
from nbl_export.verify.forms import form_of
from nbl_export.verify.forms.form import Setting
from nbl_export.verify.kept import KeptReferences
from nbl_export.verify.ladder import WITHOUT_TWIN
from nbl_export.verify.on_target import expect, save
from nbl_export.verify.perplexity import price, warn_of_far_prices

__all__ = ["conclude", "make_probe", "price_texts", "run", "setting_of"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_LONG_TOKENS = 2048
_BEYOND_WINDOW = 512
_LONGEST_PROBED_WINDOW = 256  # that short rows and the batch exceed; the long row exceeds every window


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write verify.json, and acceptance.safetensors for an engine of another machine."""
    require_engine(job.options, to_prove=True)
    result = _against_torch(job, out) if job.graph is None else _against_graph(job, out)
    write_json(out / VERIFY_FILE, result)
    return {"status": result["status"]}


def _against_torch(job: Job, out: Path) -> dict[str, Any]:
    """The content of verify.json for a model with a checkpoint."""
    from nbl_export.plan.maps_file import load_maps

    maps = load_maps(job.run.path / MAPS_FILE, job.plan.replaced)
    results: list[RungResult] = []
    rows_VD = rows_of(job, maps)
    setting, probe = setting_of(job), make_probe(job)
    results += check_rescaled(job, probe.rows[0])
    maps = exported_maps(job, maps)
    with _graphs(job, setting, maps, rows_VD, results) as directories, job.run.scratch() as scratch:
        coded = form_of(setting).coded(setting, directories, results, scratch)
        kept = kept_references(job)
        climb = Climb(setting, probe, maps, rows_VD, results, kept)
        climb.ask_torch(coded, lambda: _lent(job), () if job.quantized is None else job.quantized.weights)
        decoders = climb.run(directories, coded)
        kept.save()
        prices = []
        if job.options.fit != GIVEN_FIT:  # the original of an NBL checkpoint lacks the removed attention
            with job.ui.task("quality loss on held-back text") as progress:
                prices = price(decoders["original"], decoders["nbl"], price_texts(job), progress)
        _leave(climb, out)
    return conclude(job, results, prices)


def _leave(climb: Climb, out: Path) -> None:
    """Write acceptance.safetensors for an engine of another machine; nothing for others."""
    setting = climb.setting
    if setting.engine.capabilities.cross:
        exact = bool(climb.truth_of_codes) or setting.precision not in WITHOUT_TWIN
        save(expect(setting.precision, climb.probe, climb.references, exact=exact), out / ACCEPTANCE_FILE)


def _against_graph(job: Job, out: Path) -> dict[str, Any]:
    """The content of verify.json for a model that is only a graph."""
    from nbl_export.plan.maps_file import load_maps

    maps = load_maps(job.run.path / MAPS_FILE, job.plan.replaced)
    results: list[RungResult] = []
    original = job.run.path / "original"
    directories = {"original": original, "nbl": job.run.path / "model"}
    setting, probe = setting_of(job), make_probe(job)
    if not (original / GENAI_CONFIG).is_file():  # ONNX Runtime GenAI cannot generate text
        probe = dataclasses.replace(probe, prompts=())
    with job.run.scratch() as scratch:
        coded = form_of(setting).coded(setting, directories, results, scratch)
        kept = kept_references(job)
        climb = Climb(setting, probe, maps, None, results, kept)
        climb.ask_graph(coded, original / all_logits_file(original))
        decoders = climb.run(directories, coded)
        kept.save()
        with job.ui.task("quality loss on held-back text") as progress:
            prices = price(decoders["original"], decoders["nbl"], price_texts(job), progress)
        _leave(climb, out)
    return conclude(job, results, prices)


@contextlib.contextmanager
def _lent(job: Job) -> Iterator[Any]:
    """The torch model that graphs are made from; its memory is freed afterwards."""
    try:
        yield exported_model(job)
    finally:
        job.forget_model()


def kept_references(job: Job) -> KeptReferences:
    """The references of the original that an earlier verification of this run directory kept."""
    options = job.options
    how = [options.engine, options.provider, options.precision, options.decoder_source, job.slots]
    how += [options.quantize] if options.quantize else []
    return KeptReferences(job.run.path / REFERENCES_FILE, [job.fingerprint, job.codes, how, versions(PACKAGES)])


def setting_of(job: Job) -> Setting:
    """The verification settings of the job."""
    options = job.options
    return Setting(
        engine=job.engine,
        spec=job.spec,
        plan=job.plan,
        precision=options.precision,
        logits=options.kept_logits,
        slots=job.slots,
        nearness=_nearness(job),
        task=job.ui.task,
    )


def _nearness(job: Job) -> float | None:
    if job.quantized is not None:
        return None
    if job.options.precision == GGUF:
        return EXACT
    searched = any(option.startswith("algo_config=k_quant") for option in job.options.builder_option)
    return SEARCHED if searched else NEAREST


def conclude(job: Job, results: list[RungResult], prices: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of verify.json; prints the perplexity increases and a warning if they differ strongly."""
    from nbl_export.verify import ladder

    plan, size = job.plan, job.engine.capabilities.cache_itemsize(job.options.precision)
    layers = {"original": plan.num_layers, "nbl": len(plan.kept)}
    per_token = {subject: job.spec.cache_bytes_per_token(kept, size) for subject, kept in layers.items()}
    warning = warn_of_far_prices(prices)
    for row in prices:
        said = spoken_price(row)["increase"]
        job.ui.say(f"  perplexity {said}, {row['text']}, {row['tokens']:,} tokens")
    if warning:
        job.ui.say(f"  {warning}")
    found = ladder.summary(results, job.options.precision, prices, plan)
    texts = _uses_of(job) if prices else []
    reference = "the linearized torch model" if job.graph is None else "the input graph with maps computed in numpy"
    proof = ladder.proof(results, reference, found["status"])
    return {**found, "proof": proof, "price_warning": warning, "texts": texts, "cache_bytes_per_token": per_token}


@contextlib.contextmanager
def _graphs(
    job: Job, setting: Setting, maps: Mapping[int, Mixer], rows_VD: Any, results: list[RungResult]
) -> Iterator[dict[str, Path]]:
    """Directories of the graphs to compare: the shipped graphs, or their float32 twins after an equality check."""
    shipped = {"original": job.run.path / "original", "nbl": job.run.path / "model"}
    if not setting.static:
        yield shipped
        return
    from nbl_export.verify.float32_twins import build_twins, check_shipped

    with job.run.scratch() as scratch, job.ui.task("fp32 twins"):
        twins = build_twins(job.checkpoint, setting, maps, rows_VD, scratch)
        results += check_shipped(setting, shipped, twins)
        yield twins


def make_probe(job: Job) -> Any:
    """Rows and prompts from held-back text, and one long row, which may continue with calibration text.

    The first short row exceeds a small sliding window, the long row exceeds every sliding window.
    """
    from nbl_export.verify import ladder

    windows, held = job.windows
    ids = held.flatten().tolist()
    window = job.spec.sliding_window or 0
    first, second = _PREFILL_TOKENS
    if 0 < window <= _LONGEST_PROBED_WINDOW:
        first = window + 24
    first, second = (min(n, job.slots - ladder.DECODE_STEPS, len(ids) // 2) for n in (first, second))
    rows = (ids[: first + ladder.DECODE_STEPS], ids[-(second + ladder.DECODE_STEPS) :])
    starts = [k * len(ids) // 4 for k in (0, 1, 2)]
    new_tokens = min(_NEW_TOKENS, job.slots - _PROMPT_TOKENS)
    prompts = tuple(tuple(ids[s : s + _PROMPT_TOKENS]) for s in starts)
    long = [*ids, *windows.flatten().tolist()][: min(_long_tokens(job), job.slots)]
    return ladder.Probe(tuple(map(tuple, rows)), prompts, new_tokens, tuple(long) if len(long) > len(rows[0]) else ())


def _long_tokens(job: Job) -> int:
    from nbl_export.verify import ladder

    window = job.spec.sliding_window
    return max(_LONG_TOKENS, window + _BEYOND_WINDOW if window else 0) + ladder.DECODE_STEPS


def price_texts(job: Job) -> list[tuple[str, Any]]:
    """Final windows of both texts as arrays, cut to the sequence length. No choice in the run used these windows."""
    context = min(job.options.context, job.slots)
    return [(name, _cut(windows.numpy(), context)) for name, windows in job.texts("final")]


def _cut(windows_WT: Any, context: int) -> Any:
    ids = windows_WT.reshape(-1)
    return ids[: len(ids) // context * context].reshape(-1, context)


def _uses_of(job: Job) -> list[dict[str, Any]]:
    """The value of "texts" in verify.json: for each use of a text, its name and number of tokens."""
    options, near, far = job.options, job.held_back, job.far
    names = [job.text.name, job.far_text.name]
    both = [near] if far is None else [near, far]
    used: list[tuple[str, str, Any]] = [("calibration: scores and maps", names[0], job.windows[0])]
    if options.fit == "distilled":
        used.append(("distillation: training", names[0], job.training_windows))
        used.append(("distillation: judging", names[0], near.choosing))
    if job.plan.select in ("greedy", "efficient"):
        judges = both[:1] if options.says_itself else both
        used += [("choice of layers", n, judging(part)) for n, part in zip(names, judges, strict=False)]
    if (job.run.manifest.get("goal") or {}).get("path"):
        used += [("number of layers", n, part.deciding) for n, part in zip(names, both, strict=False)]
    used += [("final figures", n, part.final) for n, part in zip(names, both, strict=False)]
    return [{"use": use, "text": name, "tokens": int(windows.numel())} for use, name, windows in used]
