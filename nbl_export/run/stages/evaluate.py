"""The eval stage: every prepared benchmark and text on every variant.

original, nbl                the exported graphs, on ONNX Runtime
torch-original, torch-nbl    the torch models that verification compares the graphs with
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbl_export.files import key_of, write_json
from nbl_export.records.requests import VARIANTS, Subject
from nbl_export.run.job import Job
from nbl_export.run.stages.common import verdict
from nbl_export.run_directory import EVAL_FILE, MAPS_FILE

__all__ = ["run"]


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write eval.json; each finished figure is saved in the run immediately."""
    from nbl_export.run.stages import readers

    def keep(value: dict[str, Any]) -> None:
        with job.run.scratch() as scratch:
            write_json(scratch / EVAL_FILE, value)
            job.run.finish("eval", key_of("unfinished"), scratch, 0.0, readers("eval"), status=verdict(job))

    write_json(out / EVAL_FILE, _evaluate(job, keep))
    return {"status": verdict(job)}


def _evaluate(job: Job, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The content of eval.json; `keep` receives it after each new figure."""
    from nbl_export.evaluation import results

    prepared = job.evaluation
    assert prepared is not None, "the stage is left out without"
    known = results.read_entries(job.run.path / EVAL_FILE)
    models = {variant: _model_key(job, variant) for variant in VARIANTS}
    kept = {k: e for k, e in known.items() if e.get("model") == models.get(e.get("variant", ""))}
    facts = {"lm_eval": prepared.harness}
    for variant in (v for v in VARIANTS if v in prepared.request.variants):
        keys = {key_of(prepared.harness, models[variant], s.asked): s for s in prepared.subjects}
        missing = {key: subject for key, subject in keys.items() if key not in kept}
        lm = _open(job, variant) if missing else None
        for key, subject in missing.items():
            with job.ui.task(f"{variant}: {subject.name}") as progress:
                outcome = _measure(subject, lm, progress)
            about = {"model": models[variant], "data": subject.data, "config": subject.config}
            kept[key] = results.entry(key, subject.name, subject.limit, variant, outcome, **about)
            job.ui.say(f"  {variant}: {subject.name}: {_said(outcome)}")
            keep(results.summarize(kept, **facts))
    return results.summarize(kept, **facts)


def _said(outcome: Any) -> str:
    figures = [f"{name} {metric.value:.4g}" for name, metric in outcome.metrics.items()]
    return f"{', '.join(figures)} ({outcome.items} items, {outcome.seconds:.1f} s)"


def _model_key(job: Job, variant: str) -> str:
    """Fingerprint of a variant: of the graph's files, or of the checkpoint and the maps."""
    stages = job.run.stages
    if variant == "original":
        return key_of(stages["decoder"]["files"])
    if variant == "nbl":
        return key_of(stages["rewrite"]["files"])
    if variant == "torch-original":
        return key_of(job.fingerprint)
    maps = [files.get(MAPS_FILE) for s in ("plan", "distill") if (files := stages.get(s, {}).get("files", {}))]
    return key_of(job.fingerprint, maps, job.plan.replaced, job.plan.tap)


def _open(job: Job, variant: str) -> Any:
    """A variant as a model of the harness."""
    from nbl_export.evaluation.tasks import quiet_harness

    with quiet_harness():
        if not variant.startswith("torch-"):
            from nbl_export.evaluation.lm import OnnxLM

            return OnnxLM(path=str(job.run.path), variant=variant)
        from nbl_export.evaluation.lm import torch_lm
        from nbl_export.model.checkpoint.load import load_tokenizer
        from nbl_export.model.linearize import linearize
        from nbl_export.plan.maps_file import load_maps

        model = job.model
        if variant == "torch-nbl":
            job.forget_model()  # `linearize` changes the model in place
            maps = load_maps(job.run.path / MAPS_FILE, job.plan.replaced)
            model = linearize(model, maps, job.plan.tap)
        return torch_lm(model, load_tokenizer(job.checkpoint), job.spec.max_positions)


def _measure(subject: Subject, lm: Any, progress: Callable[[int, int], None]) -> Any:
    from nbl_export.evaluation import measure, perplexity, tasks

    lm.progress = progress
    if isinstance(subject.value, perplexity.NamedText):
        context, stride = subject.config["context"], subject.config["stride"]
        windows = perplexity.windows(subject.value, lm.tokenizer, context, stride, subject.limit)
        lm.progress = lambda _done, _total: None  # windows are counted here
        return measure.run_windows(windows, lm, progress)
    with tasks.quiet_harness():
        return measure.run_benchmark(subject.value, lm, subject.limit)
