"""Tasks of lm-evaluation-harness by name, with documents from the hub or from local files, and their run.

    arc_easy ─► the harness' own configuration (prompts, choices, metrics) ─┬─ data set from the hub
                                                                            └─ DIR/arc_easy/test.jsonl

A local file holds rows of the task's data set, unchanged: DIR/TASK/SPLIT.jsonl, of the splits that the task names for
its documents and for examples of its prompts. They replace the data set in the task's configuration
(`custom_dataset`). The harness' loader of JSON files would make null of a missing field, and keep a copy of the file
by its time.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError, one_line
from nbl_export.evaluation.measure import AGGREGATIONS, Metric, Outcome
from nbl_export.files import key_of, read_small

__all__ = ["Benchmark", "harness_version", "load_benchmark", "quiet_harness", "run_benchmark"]

_SHOWN = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot", "dataset_path", "dataset_name")
_MOST_BYTES = 64 << 20  # of one file; all of its documents are in memory
_SPLITS = ("test_split", "validation_split")
_EXAMPLES = ("fewshot_split", "training_split")
_SEED = 1234  # the harness' default for few-shot sampling


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness with its documents. Every prompt was rendered once as a check.

    data: name and split of the documents, and a hash if they are local. config: the settings.
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


# -- a benchmark and its documents -------------------------------------------------------------------------------


def load_benchmark(name: str, data: Path | None = None) -> Benchmark:
    """A benchmark by the harness' name, with local documents if `data` has some, and the task's own examples.

    Raises:
        UsageError: the harness has no such task, or it is a group of tasks.
        NblError: documents cannot be fetched, there are none, or a document lacks fields of the prompts.
    """
    if data is not None and not data.is_dir():
        raise NblError(f"--data {data} is not a directory")
    entry = _catalogue().task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _catalogue().all_tasks, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them"
        raise UsageError(f"--tasks: lm-evaluation-harness {harness_version()} has no task {name!r}{hint}")
    if entry.kind.name not in ("TASK", "PY_TASK"):
        raise UsageError(f"--tasks: {name} is a group of tasks; lm_eval --model nbl-onnx runs it (docs/evaluation.md)")
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(entry.yaml_path, resolve_func=True) if entry.yaml_path else {}
    shots = stock.get("num_fewshot") or 0
    local = _local(data / name, stock, shots) if data else {}
    where = str(data / name / f"{next(iter(local))}.jsonl") if data and local else f"task {name}"
    task = _load(name, stock, local, where)
    task.set_config(key="num_fewshot", value=shots)
    _check_prompts(task, where)
    split = task.config.test_split or task.config.validation_split
    found = {"name": str(task.config.dataset_path), "split": split, "documents": len(task.eval_docs)}
    if local:
        found |= {"name": where, "sha256": key_of({split: digest for split, (_, digest) in local.items()})}
    shown = {key: value for key in _SHOWN if isinstance(value := getattr(task.config, key), (str, int))}
    return Benchmark(name, task, found, {**shown, "version": task.VERSION})


def _local(directory: Path, stock: dict[str, Any], shots: int) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Rows of the task's splits that lie here, with the hash of their file; empty without documents.

    Raises:
        NblError: the task has examples, and the rows of their split are not here.
    """

    def here(kinds: tuple[str, ...]) -> dict[str, Path]:
        files = {split: directory / f"{split}.jsonl" for kind in kinds if (split := stock.get(kind))}
        return {split: file for split, file in files.items() if file.is_file()}

    documents = here(_SPLITS)
    examples = here(_EXAMPLES) if shots else {}
    if not documents:
        return {}
    if shots and not examples and (split := next(filter(None, map(stock.get, _EXAMPLES)), None)):
        raise NblError(f"task {directory.name} has {shots} examples in a prompt; give {directory / split}.jsonl")
    return {split: _read(file) for split, file in {**documents, **examples}.items()}


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of a file, and its SHA-256."""
    try:
        raw = read_small(path, _MOST_BYTES)
        rows = list[dict[str, Any]]()
    except (OSError, ValueError) as error:
        raise NblError(f"{path} cannot be read ({error}); give its first documents only") from error
    for number, line in enumerate(raw.split(b"\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
                missing = [name for name in rows[0] if name not in dict(rows[-1])]
                if missing:
                    raise ValueError(f"it has no field {missing[0]!r}")
        except (ValueError, TypeError, RecursionError) as error:
            raise NblError(f"{path}, line {number} is no row of JSON like the first: {error}") from error
    if not rows:
        raise NblError(f"{path} is empty")
    return rows, hashlib.sha256(raw).hexdigest()


def _load(name: str, stock: dict[str, Any], local: dict[str, tuple[list[dict[str, Any]], str]], where: str) -> Any:
    """The task, with its data set or with the rows of local splits."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if not local:
            return _catalogue().load([name])["tasks"][name]
        documents = {split: datasets.Dataset.from_list(rows) for split, (rows, _) in local.items()}
        splits = {kind: split if (split := stock.get(kind)) in local else None for kind in (*_SPLITS, *_EXAMPLES)}
        task = {**stock, "task": name, **splits, "custom_dataset": lambda **_: documents}
        return _catalogue().load([task])["tasks"][name]
    except Exception as error:  # the library raises many types; a prompt's template or the task's code can fail too
        if local:
            raise NblError(f"{where} does not fit task {name}: {one_line(error)}") from error
        raise NblError(
            f"{where}: its data set cannot be fetched ({one_line(error)}); give --data DIR with "
            f"{name}/SPLIT.jsonl in it, or check the network"
        ) from error


def _check_prompts(task: Any, where: str) -> None:
    """Render every document once, so that a missing field is an error now and not after an hour."""
    if not len(task.eval_docs):
        raise NblError(f"{where} has no documents")
    name = task.config.task
    shots = task.config.num_fewshot
    try:
        task.fewshot_context(task.eval_docs[0], num_fewshot=shots)
    except Exception as error:
        raise NblError(f"task {name} has no prompt with {shots} examples: {one_line(error)}") from error
    for number, document in enumerate(task.eval_docs, 1):
        try:
            prompt = task.doc_to_text(document)
            target = task.doc_to_target(document)
            choices = task.doc_to_choice(document) if task.config.doc_to_choice is not None else ["-"]
            if prompt is None or not choices or any(said in (None, "") for said in (target, *choices)):
                raise ValueError("prompt, answer or a choice is empty")
        except Exception as error:
            raise NblError(f"{where}, document {number} does not fit task {name}: {one_line(error)}") from error


# -- its run -------------------------------------------------------------------------------------------------------


def run_benchmark(benchmark: Benchmark, lm: Any, limit: int | None) -> Outcome:
    """Run all requests of the first `limit` documents on a model (None: all documents).

    `evaluate` is what `simple_evaluate` calls after it has described the machine, which takes seconds.
    """
    from lm_eval.evaluator import evaluate

    task = benchmark.task
    name = str(benchmark.task.task_name)
    task.set_fewshot_seed(seed=_SEED)  # anew for each model: all get the same examples
    started = time.monotonic()
    found = evaluate(lm=lm, task_dict={"tasks": {name: task}}, limit=limit, bootstrap_iters=0)  # `figure` has errors
    seconds = time.monotonic() - started
    samples = sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    metrics = {}
    for metric in samples[0]["metrics"]:
        kind = getattr(task.aggregation().get(metric), "__name__", "")
        higher = bool(task.higher_is_better()[metric])
        value = found["results"][name].get(f"{metric},{samples[0]['filter']}")
        if kind in AGGREGATIONS:
            metrics[metric] = Metric.of(kind, [sample[metric] for sample in samples], higher_is_better=higher)
        elif isinstance(value, (int, float)):
            metrics[metric] = Metric(float(value), None, kind, higher, ())
    return Outcome(len(samples), metrics, seconds)
