"""The eval stage: every prepared benchmark and text on every variant.

original, nbl                the exported graphs, on the CPU
torch-original, torch-nbl    the torch model, and the same with the fitted mixers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import key_of, write_json
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.records.requests import PERPLEXITY, VARIANTS, Prepared, Subject
from nbl_export.run.job import Job
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run_directory import DECODERS, EVAL_FILE, MADE_BY, MAPS_FILE

__all__ = ["EvalInputs", "declare", "run"]


@dataclass(frozen=True)
class EvalInputs:
    """What figures of benchmarks and texts follow from, beside the graphs."""

    asked: Lazy[Prepared]
    fingerprint: str
    spec: DecoderSpec
    model: Lazy[Any]
    checkpoint: Lazy[Path]


def declare(job: Job) -> EvalInputs | LeftOut:
    """The inputs of the stage; left out unless it is asked for, because it can take hours on a small machine."""
    asked = job.evaluation
    if asked is None:
        return LeftOut()
    return EvalInputs(
        asked=Lazy(asked.identity, lambda: asked),
        fingerprint=job.fingerprint,
        spec=job.decoder,
        model=job.torch.model,
        checkpoint=job.torch.checkpoint,
    )


def run(inputs: EvalInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write eval.json; each finished figure is saved in the run immediately."""

    def keep(value: dict[str, Any]) -> None:
        with place.run.scratch() as scratch:
            write_json(scratch / EVAL_FILE, value)
            place.run.finish("eval", key_of("unfinished"), scratch, 0.0, place.readers, status=place.verdict)

    write_json(out / EVAL_FILE, _evaluate(inputs, place, keep))
    return {"status": place.verdict}


def _evaluate(inputs: EvalInputs, place: Place, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The content of eval.json; `keep` receives it after each new figure."""
    from nbl_export.evaluation import results

    prepared = inputs.asked.value
    known = results.read_entries(place.run.path / EVAL_FILE)
    models = {variant: _model_key(inputs, place, variant) for variant in VARIANTS}
    kept = {k: e for k, e in known.items() if e.get("model") == models.get(e.get("variant", ""))}
    facts = {"lm_eval": prepared.harness or results.read_harness(place.run.path / EVAL_FILE)}
    for variant in (v for v in VARIANTS if v in prepared.request.variants):
        keys = {key_of(prepared.harness_of(s), models[variant], s.asked): s for s in prepared.subjects}
        missing = {key: subject for key, subject in keys.items() if key not in kept}
        tasks = any(prepared.harness_of(subject) for subject in missing.values())
        lm = _open(inputs, place, variant, tasks=tasks) if missing else None
        for key, subject in missing.items():
            with place.ui.task(f"{variant}: {subject.name}") as progress:
                outcome = _measure(subject, lm, progress, behind_prompt=place.plan.predicts)
            about = {"model": models[variant], "data": subject.data, "config": subject.config}
            kept[key] = results.entry(key, subject.name, subject.limit, variant, outcome, **about)
            place.ui.say(f"  {variant}: {subject.name}: {_said(outcome)}")
            keep(results.summarize(kept, **facts))
    return results.summarize(kept, **facts)


def _said(outcome: Any) -> str:
    figures = [f"{name} {metric.value:.4g}" for name, metric in outcome.metrics.items()]
    return f"{', '.join(figures)} ({outcome.items} items, {outcome.seconds:.1f} s)"


def _model_key(inputs: EvalInputs, place: Place, variant: str) -> str:
    """Fingerprint of a variant: of the graph's files, or of the checkpoint and the maps."""
    stages, fingerprint = place.run.stages, inputs.fingerprint
    if not variant.startswith("torch-"):
        return key_of(stages.get(MADE_BY[DECODERS[variant]], {}).get("files"))
    if variant == "torch-original":
        return key_of(fingerprint)
    maps = [files.get(MAPS_FILE) for s in ("plan", "distill") if (files := stages.get(s, {}).get("files", {}))]
    return key_of(fingerprint, maps, place.plan.layers, place.plan.tap)


def _open(inputs: EvalInputs, place: Place, variant: str, *, tasks: bool) -> Any:
    """A variant as a model of the harness if it has tasks, else as a reader of texts."""
    from nbl_export.evaluation.tasks import quiet_harness

    with quiet_harness():
        reader = _reader(inputs, place, variant)
        if not tasks:
            return reader
        from nbl_export.evaluation.lm import DecoderLM

        return DecoderLM(reader)


def _reader(inputs: EvalInputs, place: Place, variant: str) -> Any:
    from nbl_export.evaluation.reader import graph_reader, torch_reader

    if not variant.startswith("torch-"):
        name = DECODERS[variant]
        place.run.check(MADE_BY[name])
        return graph_reader(place.run.path / name)
    from nbl_export.model.checkpoint.load import load_tokenizer
    from nbl_export.model.linearize import linearize

    model = inputs.model.value
    if variant == "torch-nbl":
        inputs.model.forget()  # `linearize` changes the model in place
        model = linearize(model, place.maps(), place.plan.tap)
    return torch_reader(model, load_tokenizer(inputs.checkpoint.value), inputs.spec.max_positions)


def _measure(subject: Subject, lm: Any, progress: Callable[[int, int], None], *, behind_prompt: bool) -> Any:
    """The outcome of a subject. Behind a prompt: the first half of each window is one, in both decoders."""
    from nbl_export.evaluation import length, measure, tasks

    test, context = subject.config.get("output_type"), subject.config.get("context", 0)
    if test in length.TESTS:
        return length.run_length(test, subject.value, lm, context, subject.limit, progress, behind_prompt=behind_prompt)
    if test == PERPLEXITY:
        windows = measure.windows(subject.value, lm.tokenizer, context, subject.limit)
        return measure.run_windows(windows, lm, progress, context // 2 if behind_prompt else 1)
    lm.progress = progress
    with tasks.quiet_harness():
        return measure.run_benchmark(subject.value, lm, subject.limit)
