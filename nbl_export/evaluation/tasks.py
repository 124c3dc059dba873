"""Benchmarks of lm-evaluation-harness by name, with documents from the hub or from local files.

    arc_easy ─► the harness' own configuration (prompts, choices, metrics) ─┬─ data set from the hub
    mmlu ─► its 57 tasks ─► the same of each                                └─ DIR/arc_easy/test.jsonl

Only the source of the documents differs; the task's configuration is the harness' own. A local file holds rows of the
task's data set, unchanged: DIR/TASK/test.jsonl, or DIR/TASK/validation.jsonl if the task has no test split. Examples of
few-shot prompts are rows of the split that the task names for them, such as DIR/TASK/dev.jsonl.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError

__all__ = ["Benchmark", "harness_version", "load_benchmark", "quiet_harness"]

_SHOWN = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "num_fewshot", "dataset_path", "dataset_name")
_MOST_BYTES = 64 << 20  # of one file; all of its documents are in memory
_SPLITS, _EXAMPLES = ("test_split", "validation_split"), ("fewshot_split", "training_split")


@dataclass(frozen=True)
class Benchmark:
    """A task of the harness with its documents, or a group of tasks. Every prompt was rendered once as a check.

    data: name and split of the documents, and SHA-256 if they are local; of a group by task. config: the settings.
    """

    name: str
    tasks: tuple[Any, ...]
    data: dict[str, Any]
    config: dict[str, Any]

    @property
    def most(self) -> int:
        """Documents of the longest task."""
        return max(len(task.eval_docs) for task in self.tasks)


@dataclass(frozen=True)
class _Local:
    """Documents of a local file, the split that they replace, and the name and hash of the file.

    examples: of few-shot prompts, of another file of the task; None without one.
    """

    name: str
    split: str
    sha256: str
    documents: tuple[dict[str, Any], ...]
    examples: _Local | None = None


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


def load_benchmark(name: str, data: Path | None = None, shots: int | None = None) -> Benchmark:
    """A benchmark by the harness' name, with local documents if `data` has some.

    Args:
        shots: examples in a prompt; None is the task's own number.

    Raises:
        UsageError: the harness has no such task.
        NblError: documents cannot be fetched, there are none, or a document lacks fields of the prompts.
    """
    entry = _catalogue().task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, _catalogue().all_tasks, 3)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; lm_eval ls tasks lists them"
        raise UsageError(f"--tasks: lm-evaluation-harness {harness_version()} has no task {name!r}{hint}")
    if entry.kind.name in ("TASK", "PY_TASK"):
        return _single(name, entry, data, shots)
    own = entry.cfg.get("aggregate_metric_list") if entry.kind.name == "GROUP" else None
    if not own or not all(metric.get("weight_by_size") for metric in own):
        raise UsageError(f"--tasks: {name} is a group without a figure of its own; name the tasks in it one by one")
    index = _catalogue().task_index
    parts = [_single(leaf, index[leaf], data, shots) for leaf in _leaves(name)]
    return Benchmark(
        name,
        tuple(task for part in parts for task in part.tasks),
        {part.name: part.data for part in parts},
        {part.name: part.config for part in parts},
    )


def _leaves(name: str) -> list[str]:
    """Names of the tasks of a group, of its groups and of its tags."""
    entry = _catalogue().task_index[name]
    if entry.kind.name in ("TASK", "PY_TASK"):
        return [name]
    return [leaf for part in (sorted(entry.tags) if entry.cfg is None else entry.cfg["task"]) for leaf in _leaves(part)]


def _single(name: str, entry: Any, data: Path | None, shots: int | None) -> Benchmark:
    stock = _stock(entry)
    local = _find_local(name, data, stock) if data else None
    shots = (stock.get("num_fewshot") or 0) if shots is None else shots
    if shots and local and not local.examples:
        split = next((split for kind in _EXAMPLES if (split := stock.get(kind))), None)
        there = f"give them in {Path(local.name).parent / f'{split}.jsonl'}" if split else "it names no rows for them"
        raise NblError(f"task {name} is to have {shots} examples in a prompt: {there}, or use --num-fewshot 0")
    task = _local_task(name, stock, local) if local else _hub_task(name, data)
    task.set_config(key="num_fewshot", value=shots)
    _check_prompts(name, task, local)
    split = task.config.test_split or task.config.validation_split
    found = {"name": str(task.config.dataset_path), "split": split, "documents": len(task.eval_docs)}
    if local:
        found |= {"name": local.name, "sha256": local.sha256}
        found |= {"examples": local.examples.sha256} if local.examples else {}
    shown = {key: value for key in _SHOWN if isinstance(value := getattr(task.config, key), (str, int))}
    return Benchmark(name, (task,), found, {**shown, "version": task.VERSION})


def _stock(entry: Any) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(entry.yaml_path, resolve_func=True)) if entry.yaml_path else {}


def _find_local(task: str, directory: Path, stock: dict[str, Any]) -> _Local | None:
    """Documents of a task below `directory`: the test split, else the validation split; None without a file.

    Raises:
        NblError: `directory` is not a directory, or a file is empty or damaged or lacks a field.
    """
    if not directory.is_dir():
        raise NblError(f"--data {directory} is not a directory")
    documents, examples = (_first_file(directory / task, stock, kinds) for kinds in (_SPLITS, _EXAMPLES))
    return documents and dataclasses.replace(documents, examples=examples)


def _first_file(directory: Path, stock: dict[str, Any], kinds: tuple[str, ...]) -> _Local | None:
    for split in map(stock.get, kinds):
        path = directory / f"{split}.jsonl"
        if isinstance(split, str) and path.is_file():
            return _read_rows(path, split)
    return None


def _read_rows(path: Path, split: str) -> _Local:
    raw = _read(path)
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(raw.decode("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NblError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise NblError(f"{path}, line {number} is not an object with fields")
        rows.append(row)
        missing = [name for name in rows[0] if name not in row]
        if missing:  # the library would take null for the field
            raise NblError(f"{path}, document {len(rows)} has no field {missing[0]!r}")
    return _Local(str(path), split, hashlib.sha256(raw).hexdigest(), tuple(rows))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise NblError(f"{path} is larger than {_MOST_BYTES >> 20} MiB; give its first documents only")
        with path.open("rb") as stream:
            raw = stream.read(_MOST_BYTES)
        raw.decode("utf-8")
    except OSError as error:
        raise NblError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise NblError(f"{path} is not UTF-8 (byte {error.start}); convert it with iconv") from error
    if not raw.strip():
        raise NblError(f"{path} is empty")
    return raw


def _local_task(name: str, stock: dict[str, Any], local: _Local) -> Any:
    """The stock task with local documents."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    datasets.disable_progress_bars()
    config = {key: value for key, value in stock.items() if key not in ("tag", "group", "task_list")}
    splits: dict[str, str | None] = dict.fromkeys((*_SPLITS, *_EXAMPLES))
    documents = {}
    for kinds, found in ((_SPLITS, local), (_EXAMPLES, local.examples)):
        if found:
            splits |= {kind: found.split for kind in kinds if stock.get(kind) == found.split}
            documents[found.split] = datasets.Dataset.from_list(list(found.documents))
    config |= {"task": name, **splits}
    try:
        return ConfigurableTask(config={**config, "custom_dataset": lambda **_: documents})
    except Exception as error:  # the prompt template or the task's code can fail on a document
        raise NblError(f"{local.name} does not fit task {name}: {_line(error)}") from error


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


def _check_prompts(name: str, task: Any, local: _Local | None) -> None:
    """Render every document once, so that a missing field is an error now and not after an hour."""
    where = local.name if local else f"task {name}"
    if not len(task.eval_docs):
        raise NblError(f"{where} has no documents")
    shots = task.config.num_fewshot
    try:
        task.fewshot_context(task.eval_docs[0], num_fewshot=shots)
    except Exception as error:
        raise NblError(f"task {name} has no prompt with {shots} examples: {_line(error)}") from error
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
