"""Tasks of lm-evaluation-harness. The harness loads, prompts and scores; here its samples become items of an outcome.

    arc_easy, mine.yaml ─► TaskManager.load ─► tasks ─► evaluate(decoder) ─► samples ─► Outcome

A name of a group stands for its tasks. A YAML file is a task in the harness' own form, which may read local documents.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError, one_line
from nbl_export.evaluation.measure import AGGREGATIONS, Metric, Outcome
from nbl_export.files import key_of
from nbl_export.records.requests import Subject

__all__ = ["catalogue", "load_tasks", "run_task"]

_SHOWN = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot", "dataset_path", "dataset_name")
_SEED = 1234  # the harness' default for few-shot sampling


@functools.cache
def catalogue() -> Any:
    """All tasks of the harness; reading their configurations takes seconds.

    From now on, the harness and the hub log only errors in this process; both log much at lower levels.

    Raises:
        MissingPackageError: the harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingPackageError("lm_eval", "eval", "evaluation") from error
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return TaskManager()


def load_tasks(names: tuple[str, ...], limit: int | None) -> list[Subject]:
    """The tasks of names, groups and YAML files, with their documents. Every prompt is rendered once as a check.

    Raises:
        MissingPackageError: the harness is not installed.
        UsageError: the harness has no such task.
        NblError: documents cannot be fetched, or a document does not fit its task.
    """
    manager = catalogue()
    import datasets
    import lm_eval

    datasets.disable_progress_bars()
    found: dict[str, Subject] = {}
    for name in names:
        if name not in manager.task_index and not Path(name).is_file():
            raise UsageError(
                f"--tasks: {name!r} is neither a file nor a task of lm-evaluation-harness {lm_eval.__version__}; "
                "lm_eval ls tasks lists them"
            )
        try:
            for task in manager.load([name])["tasks"].values():
                found[task.task_name] = _subject(task, limit, lm_eval.__version__)
        except Exception as error:  # the library raises many types; a prompt's template or the task's code can fail too
            raise NblError(
                f"--tasks: {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); check the network, or "
                "give a YAML file of a task on local documents (docs/evaluation.md)"
            ) from error
    return list(found.values())


def _subject(task: Any, limit: int | None, version: str) -> Subject:
    """A task whose documents have prompts and targets, with what its figures depend on."""
    shots = task.config.num_fewshot or 0
    task.set_config(key="num_fewshot", value=shots)
    documents = list(task.eval_docs)
    limit = None if (limit or 0) >= len(documents) else limit
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    data = {
        "name": str(task.config.dataset_path),
        "split": task.config.test_split or task.config.validation_split,
        "documents": len(documents),
        "sha256": key_of(documents, list(task.fewshot_docs()) if shots else []),
    }
    shown = {key: value for key in _SHOWN if isinstance(value := getattr(task.config, key), (str, int))}
    return Subject(task.task_name, task, limit, data, {**shown, "version": task.VERSION, "lm_eval": version})


def run_task(task: Any, lm: Any, limit: int | None) -> Outcome:
    """Run the first `limit` documents on a model (None: all documents).

    `evaluate` is what `simple_evaluate` calls after it has described the machine, which takes seconds.
    """
    from lm_eval import evaluate

    name = task.task_name
    task.set_fewshot_seed(seed=_SEED)  # anew for each model: all get the same examples
    found = evaluate(
        lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0
    )  # `aggregate_with_stderr` has errors
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    first = samples[0]
    samples = [sample for sample in samples if sample["filter"] == first["filter"]]
    metrics = {}
    for metric in first["metrics"]:
        kind = getattr(task.aggregation().get(metric), "__name__", "")
        higher = bool(task.higher_is_better()[metric])
        value = found["results"][name].get(f"{metric},{first['filter']}")
        if kind in AGGREGATIONS:
            metrics[metric] = Metric.of(kind, [sample[metric] for sample in samples], higher_is_better=higher)
        elif isinstance(value, (int, float)):
            metrics[metric] = Metric(float(value), None, kind, higher, ())
    return Outcome(len(samples), metrics)
