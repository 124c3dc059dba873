"""The stage `eval` of a run directory: benchmarks and texts, loaded and checked first, then each on each variant.

original, nbl                the exported graphs, on ONNX Runtime
torch-original, torch-nbl    the torch models that they are held to
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.artifacts import RunDirectory, key_of
from nbl_export.engines import load_engine
from nbl_export.errors import NblError, UsageError
from nbl_export.job import Job
from nbl_export.nbl_checkpoint import GIVEN_FIT, NO_ORIGINAL
from nbl_export.progress import Ui

__all__ = ["VARIANTS", "EvalRequest", "Prepared", "evaluate", "run"]

VARIANTS = ("original", "nbl", "torch-original", "torch-nbl")  # in the order that they run


@dataclass(frozen=True)
class EvalRequest:
    """What to measure. texts: (name, file) pairs; context and stride in tokens are for them alone."""

    tasks: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("original", "nbl")
    limit: int | None = None
    data: Path | None = None
    texts: tuple[tuple[str, str], ...] = ()
    context: int = 512
    stride: int = 512

    def __post_init__(self) -> None:
        if not self.tasks and not self.texts:
            raise UsageError("nothing to evaluate: give --tasks, --perplexity or both")
        unknown = [v for v in self.variants if v not in VARIANTS]
        if unknown or not self.variants:
            raise UsageError(f"--variants takes {', '.join(VARIANTS)}, not {unknown[0] if unknown else 'nothing'!r}")
        if not 1 <= self.stride <= self.context:
            raise UsageError(f"--stride {self.stride} is not between 1 and --ppl-context {self.context}")


@dataclass(frozen=True)
class Subject:
    """A benchmark or a text, by its name in eval.json. `asked` is everything that its figures depend on."""

    name: str
    value: Any
    limit: int | None
    data: dict[str, Any]
    config: dict[str, Any]

    @property
    def asked(self) -> list[Any]:
        data = self.data.get("sha256", self.data)  # a file is what it holds, wherever it lies
        return [self.name, self.limit, data, self.config]


@dataclass(frozen=True)
class Prepared:
    """A request with its benchmarks and texts loaded and checked."""

    request: EvalRequest
    subjects: tuple[Subject, ...]
    harness: str

    @property
    def identity(self) -> list[Any]:
        """Equal for requests that ask for the same."""
        return [self.harness, [s.asked for s in self.subjects], list(self.request.variants)]


def evaluate(output: Path, request: EvalRequest, ui: Ui, *, force: bool = False) -> RunDirectory:
    """Measure into DIR/eval.json, and bring a report that was there up to date; finished figures are kept.

    Raises:
        NblError: anything the user can put right, before anything is computed where it can be known by then.
    """
    from nbl_export.pipeline import run_stages

    run = RunDirectory.existing(output)
    _check_run(run, request)
    prepared = _prepare(request, ui)
    has_report = "report" in run.stages
    return run_stages(output, "report" if has_report else "eval", ui, force=force, evaluation=prepared)


def _check_run(run: RunDirectory, request: EvalRequest) -> None:
    positions = int(run.manifest["decoder"]["max_positions"])
    if request.texts and request.context > positions:
        raise NblError(f"--ppl-context {request.context} is beyond the model's {positions} positions")
    if run.manifest["options"].get("fit") == GIVEN_FIT and any(v.endswith("original") for v in request.variants):
        raise NblError(f"{run.path} has no original to evaluate: {NO_ORIGINAL}; use --variants nbl or torch-nbl")
    engine = run.manifest["options"]["engine"]
    if load_engine(engine).CAPABILITIES.static and not all(v.startswith("torch-") for v in request.variants):
        raise NblError(
            f"{run.path} is a run for engine {engine}, whose graphs are for its compiler; evaluate the torch models "
            "(--variants torch-original,torch-nbl), or a run with --engine ort"
        )


def _prepare(request: EvalRequest, ui: Ui) -> Prepared:
    from nbl_export import corpus
    from nbl_export.evaluation import perplexity, tasks

    subjects = []
    for name, file in request.texts:
        named = perplexity.NamedText(name, corpus.read_text(file))
        windows = {"context": request.context, "stride": request.stride, "output_type": "perplexity"}
        data = {"name": named.text.name, "sha256": named.text.sha256}
        subjects.append(Subject(f"perplexity:{name}", named, request.limit, data, windows))
    names = tuple(dict.fromkeys(request.tasks))
    with tasks.quiet_harness(), ui.task("tasks") as progress:
        version = tasks.harness_version()
        for done, name in enumerate(names):
            progress(done, len(names))
            found = tasks.load_benchmark(name, request.data)
            limit = None if (request.limit or 0) >= found.data["documents"] else request.limit
            subjects.append(Subject(name, found, limit, found.data, found.config))
    return Prepared(request, tuple(subjects), version)


def run(job: Job, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The value of eval.json; `keep` is given it whenever a figure has been added."""
    from nbl_export.evaluation import results

    prepared: Prepared = job.evaluation
    known = results.read_entries(job.run.path / "eval.json")
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
    """Fingerprint of a model: of the graph's files, or of the checkpoint and the maps."""
    stages = job.run.stages
    if variant == "original":
        return key_of(stages["decoder"]["files"])
    if variant == "nbl":
        return key_of(stages["rewrite"]["files"])
    if variant == "torch-original":
        return key_of(job.fingerprint)
    maps = [files.get("maps.safetensors") for s in ("plan", "distill") if (files := stages.get(s, {}).get("files", {}))]
    return key_of(job.fingerprint, maps, job.plan.replaced, job.plan.tap)


def _open(job: Job, variant: str) -> Any:
    """A model of the harness."""
    from nbl_export.evaluation.tasks import quiet_harness

    with quiet_harness():
        if not variant.startswith("torch-"):
            from nbl_export.evaluation.lm import OnnxLM

            return OnnxLM(path=str(job.run.path), variant=variant, threads=job.options.first_threads)
        from nbl_export.checkpoint import load_tokenizer
        from nbl_export.evaluation.torch_lm import torch_lm
        from nbl_export.linearize import linearize
        from nbl_export.plan import load_maps

        model = job.model
        if variant == "torch-nbl":
            del job.model  # it is linearized in place
            maps = load_maps(job.run.path / "maps.safetensors", job.plan.replaced)
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
