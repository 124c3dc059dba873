"""Benchmarks of lm-evaluation-harness by name, with documents from the hub or from local files.

    arc_easy ─► the harness' own configuration (prompts, choices, metrics) ─┬─ data set from the hub
                                                                            └─ DIR/arc_easy/test.jsonl

Only the source of the documents differs; the task's configuration is the harness' own. A local file holds rows of the
stock data set (DIR/TASK/SPLIT.jsonl) or one of the forms in `local_data`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError
from nbl_export.evaluation.local_data import LocalData, find_local

__all__ = ["Benchmark", "harness_version", "load_benchmark", "quiet_harness"]

_SHOWN = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot", "dataset_path", "dataset_name")
_SEED = 1234  # the harness' default for few-shot sampling; zero shots sample nothing


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness with its documents; every prompt was rendered once as a check.

    data: name and split of the documents, and SHA-256 if they are local. config: the task's settings.
    """

    name: str
    task: Any
    data: dict[str, Any]
    config: dict[str, Any]


@functools.cache
def harness_version() -> str:
    """Installed version of lm-evaluation-harness.

    Raises:
        MissingPackageError: the harness is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise MissingPackageError("lm_eval", "eval", "evaluation") from error
    return str(lm_eval.__version__)


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Log only errors of the harness and the hub; both log much at lower levels."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache
def _catalogue() -> Any:
    """All tasks of the harness; reading their configurations takes seconds."""
    harness_version()
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_benchmark(name: str, data: Path | None = None) -> Benchmark:
    """A benchmark by the harness' name, with local documents if `data` has some.

    Raises:
        UsageError: the harness has no such task.
        NblError: documents cannot be fetched, there are none, or a document lacks fields of the prompts.
    """
    entry = _catalogue().task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _catalogue().all_tasks, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them"
        raise UsageError(f"--tasks: lm-evaluation-harness {harness_version()} has no task {name!r}{hint}")
    if entry.kind.name not in ("TASK", "PY_TASK"):
        raise UsageError(f"--tasks: {name} is a group of tasks; name the tasks in it one by one")
    local = find_local(name, data, _stock(entry)) if data else None
    task = _local_task(name, _stock(entry), local) if local else _hub_task(name, data)
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)
    _check_prompts(name, task, local)
    split = task.config.test_split or task.config.validation_split
    found = {"name": str(task.config.dataset_path), "split": split, "documents": len(task.eval_docs)}
    if local:
        found |= {"name": local.name, "sha256": local.sha256}
    shown = {key: value for key in _SHOWN if isinstance(value := getattr(task.config, key), (str, int))}
    return Benchmark(name, task, found, {**shown, "version": task.VERSION})


def _stock(entry: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(entry.yaml_path, resolve_func=True)) if entry.yaml_path else {}


def _local_task(name: str, stock: dict[str, Any], local: LocalData) -> Any:
    """The stock task with local documents."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    datasets.disable_progress_bars()
    config = {key: value for key, value in stock.items() if key not in ("tag", "group", "task_list")}
    splits = {kind: local.split if stock.get(kind) == local.split else None for kind in _SPLITS}
    documents = {local.split: datasets.Dataset.from_list(list(local.documents))}
    config |= {"task": name, "training_split": None, "fewshot_split": None, **splits}
    try:
        return ConfigurableTask(config={**config, "custom_dataset": lambda **_: documents})
    except Exception as error:  # the prompt template or the task's code can fail on a document
        raise NblError(f"{local.name} does not fit task {name}: {_line(error)}") from error


_SPLITS = ("test_split", "validation_split")


def _hub_task(name: str, data: Path | None) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return _catalogue().load([name])["tasks"][name]
    except Exception as error:  # the library raises many types
        where = f"{data} has no file for it, and " if data else ""
        raise NblError(
            f"task {name}: {where}its data set cannot be fetched ({_line(error)}); "
            f"give --data DIR with {name}/SPLIT.jsonl in it, or check the network"
        ) from error


def _check_prompts(name: str, task: Any, local: LocalData | None) -> None:
    """Render every document once, so that a missing field is an error now and not after an hour."""
    where = local.name if local else f"task {name}"
    if not len(task.eval_docs):
        raise NblError(f"{where} has no documents")
    for number, document in enumerate(task.eval_docs, 1):
        try:
            prompt, target = task.doc_to_text(document), task.doc_to_target(document)
            choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else ["-"]
            if prompt is None or target in (None, "") or not choices or any(c in (None, "") for c in choices):
                raise ValueError("prompt, answer or a choice is empty")
        except Exception as error:
            raise NblError(f"{where}, document {number} does not fit task {name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
