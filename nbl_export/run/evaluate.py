"""Evaluation of a finished run: checks the request, then runs the stage `eval`."""

from __future__ import annotations

from pathlib import Path

from nbl_export.errors import NblError
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL
from nbl_export.records.requests import EvalRequest, Prepared, Subject
from nbl_export.run.progress import Ui
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import load_engine

__all__ = ["evaluate"]


def evaluate(output: Path, request: EvalRequest, ui: Ui, *, force: bool = False) -> RunDirectory:
    """Write figures to DIR/eval.json, and update an existing report. Finished figures are reused.

    Raises:
        NblError: an error that the user can correct; raised before any computation if possible.
    """
    from nbl_export.run.pipeline import run_stages

    run = RunDirectory.existing(output)
    _check_run(run, request)
    prepared = _prepare(request, ui)
    has_report = "report" in run.stages
    return run_stages(output, "report" if has_report else "eval", ui, force=force, asked=prepared)


def _check_run(run: RunDirectory, request: EvalRequest) -> None:
    positions = int(run.manifest["decoder"]["max_positions"])
    if request.texts and request.context > positions:
        raise NblError(f"--ppl-context {request.context} is beyond the model's {positions} positions")
    if run.manifest["options"].get("fit") == CHECKPOINT_FIT and any(v.endswith("original") for v in request.variants):
        raise NblError(f"{run.path} has no original to evaluate: {NO_ORIGINAL}; use --variants nbl or torch-nbl")
    engine = run.manifest["options"]["engine"]
    if load_engine(engine).capabilities.static and not all(v.startswith("torch-") for v in request.variants):
        raise NblError(
            f"{run.path} is a run for engine {engine}, and ONNX Runtime cannot evaluate its graphs; evaluate the torch "
            "models (--variants torch-original,torch-nbl), or a run with --engine ort"
        )


def _prepare(request: EvalRequest, ui: Ui) -> Prepared:
    from nbl_export.evaluation import perplexity, tasks
    from nbl_export.text import corpus

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
