"""Steps for a directory that ONNX Runtime GenAI runs with a provider of a GPU.

GenAI has the engine, its caches and its stream inside. So these steps see tokens and logits alone: they compare the
provider with ONNX Runtime's CPU provider, which verified the same graph.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.acceptance import material
from nbl_export.acceptance.child import Task, apart
from nbl_export.acceptance.compare import require_close
from nbl_export.acceptance.material import STEPS_OF_A_TEXT, Material
from nbl_export.acceptance.verdict import (
    GENAI,
    CannotRun,
    Failed,
    Notes,
)
from nbl_export.targets import load_engine
from nbl_export.targets.base import Availability

__all__ = ["GenaiParts", "GenaiTarget", "clock", "launches", "machine", "prefill", "texts"]

_BLOCKING = "CUDA_LAUNCH_BLOCKING"  # "1": each launch of a kernel waits for the kernel (CUDA C++ Programming Guide)
_SHOWN = (1, 2, 7, 16, 33)
_STEPS = 48
_NEW_TOKENS = 32
_TIMED, _WARM_UP = 32, 8
_MOST = 0.25  # of the seconds of a step, that reading its logits may take; copying them takes far less


@dataclass(frozen=True)
class GenaiParts:
    """How a directory is opened."""

    provider: str

    def available(self) -> Availability:
        """Whether the provider runs here."""
        return load_engine("ort", self.provider).probe_run()

    def runner(self, directory: Path) -> Any:
        """The deployed runner on the provider."""
        return load_engine("ort", self.provider).open_runner(directory)

    def clock(self) -> float:
        """Seconds of this machine since a fixed moment."""
        return time.perf_counter()


@dataclass(frozen=True)
class GenaiTarget:
    """What is accepted.

    Attributes:
        engines: subject and model directory, in the order of the checks.
        values: acceptance.safetensors.
    """

    directory: Path
    engines: tuple[tuple[str, Path], ...]
    values: Path
    parts: GenaiParts

    @functools.cached_property
    def material(self) -> Material:
        """What to compare with."""
        return material.load(self.values)

    def runners(self, notes: Notes) -> Iterator[tuple[str, Any]]:
        """Subject and open runner, one after the other."""
        for subject, directory in self.engines:
            notes.doing(f"loading {subject}")
            with self.parts.runner(directory) as runner:
                yield subject, runner


def machine(target: GenaiTarget, notes: Notes) -> None:
    """The provider runs here."""
    notes.doing(f"asking for the provider {target.parts.provider}")
    found = target.parts.available()
    if not found.available:
        raise CannotRun(f"{target.directory} cannot be accepted here: {found.reason}")
    notes.see("provider", found.reason)


def texts(target: GenaiTarget, notes: Notes) -> None:
    """Chunks and single tokens of eight texts give the logits of the CPU provider."""
    values = target.material
    for subject, runner in target.runners(notes):
        columns, expected = values.of(subject, "columns"), values.of(subject, "logits")
        got = np.zeros(columns.shape, np.float32)
        for number, (row, marks) in enumerate(zip(values.texts.ids, values.texts.marks, strict=True)):
            runner.begin(len(row))
            for step, (start, end) in enumerate(itertools.pairwise((0, *marks))):
                notes.doing(f"running {STEPS_OF_A_TEXT[step]} of text {number} on {subject}, {end - start} tokens")
                got[number, step] = _append(runner, row[start:end])[columns[number, step]]
        for step, title in enumerate(STEPS_OF_A_TEXT):
            name = f"{subject}, logits after the {title}"
            require_close(notes, name, got[:, step], expected[:, step], values.limit)


def _append(runner: Any, ids: Any) -> np.ndarray:
    runner.append(ids)
    logits: np.ndarray = runner.last_logits()
    if bad := int((~np.isfinite(logits)).sum()):
        raise Failed(f"{bad} of {logits.size} logits are not finite after {len(ids)} tokens")
    return logits


def prefill(target: GenaiTarget, notes: Notes) -> None:
    """A chunk gives what its tokens give one by one."""
    ids = list(itertools.chain.from_iterable(target.material.texts.ids))[:_STEPS]
    for subject, runner in target.runners(notes):
        runner.begin(len(ids))
        notes.doing(f"running {len(ids)} single steps on {subject}")
        steps = [_append(runner, [token]) for token in ids]
        for tokens in sorted({n for n in _SHOWN if n < len(ids)} | {len(ids)}):
            runner.rewind(0)
            notes.doing(f"running a chunk of {tokens} tokens on {subject}")
            name = f"{subject}, a chunk of {tokens} tokens against single steps"
            require_close(notes, name, _append(runner, ids[:tokens]), steps[tokens - 1], target.material.limit)


def launches(target: GenaiTarget, notes: Notes) -> None:
    """Greedy text is the same if every kernel is waited for: no kernel reads what another still writes."""
    said: dict[str, list[Any]] = {}
    for blocking in ("0", "1"):
        notes.doing(f"generating text with {_BLOCKING}={blocking}")
        found: list[Any] = []
        task = Task(functools.partial(_generate, target, blocking), GENAI, "")
        outcome = apart(task, functools.partial(_keep, found))
        if outcome.verdict != "passed":
            raise Failed(f"with {_BLOCKING}={blocking}: {outcome.said}")
        said[blocking] = found
    notes.see("texts compared", len(said["0"]))
    if said["0"] != said["1"]:
        raise Failed(f"greedy text differs with {_BLOCKING}=1: a kernel reads what another still writes")


def _keep(found: list[Any], kind: str, value: Any) -> None:
    if kind == "saw":
        found.append(value["value"])


def _generate(target: GenaiTarget, blocking: str, notes: Notes) -> None:
    os.environ[_BLOCKING] = blocking  # before anything of CUDA is loaded in this process
    for subject, runner in target.runners(notes):
        for row in target.material.texts.ids[-2:]:
            notes.see(subject, [int(token) for token in runner.greedy(row, _NEW_TOKENS)])


def clock(target: GenaiTarget, notes: Notes) -> None:
    """A step has its logits when it returns: reading them afterwards takes no time that belongs to the step."""
    read_clock = target.parts.clock
    for subject, runner in target.runners(notes):
        ids = (target.material.texts.ids[-1] * 3)[: _WARM_UP + _TIMED]
        runner.begin(len(ids))
        step = reading = 0.0
        notes.doing(f"timing steps of {subject}")
        for number, token in enumerate(ids):
            before = read_clock()
            runner.append([token])
            between = read_clock()
            runner.pick()
            if number >= _WARM_UP:
                step += between - before
                reading += read_clock() - between
        notes.see(f"{subject}, milliseconds of {_TIMED} steps", 1000 * step)
        notes.see(f"{subject}, milliseconds of picking their tokens", 1000 * reading)
        if reading > _MOST * step:
            raise Failed(f"{subject}: picking a token takes {reading / max(step, 1e-9):.0%} of the time of its step")
