"""What verification leaves for an engine on its own machine, and the checks of a runner against it.

acceptance-values.json holds what the ladder's references say, for a machine with neither torch nor checkpoint: the
fields of `Expected`.

The checks of the ladder, in its steps, and what only a GPU can show:

    original, nbl   logits of the last token of a prefill and of 16 cached steps; short rows, and the long row in chunks
    last_token      a chunk behind a cache
    text            greedy text
    clock           a step has its logits when it returns, so that a clock can be read
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import read_json, replacing
from nbl_export.records.from_json import read_record, require
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import apart
from nbl_export.verify import ladder
from nbl_export.verify.ladder import DECODE_STEPS, LONG_CHUNK, ON_GPU, Probe, Reference, run_chunks

__all__ = ["POSITIONS", "Expected", "Sample", "checks", "expect", "load", "save"]

POSITIONS = DECODE_STEPS + 1  # of each row: the last token of the prefill, and the cached steps
_LIKELIEST = 32  # tokens whose logits are kept
_KEPT = 144
_WARM_UP = 8  # steps that are not timed
_MOST_READING = 0.25  # of the time of a step; copying logits takes far less
_MOST_RATIO = 2.0  # of the figures of nbl over the largest one of the original
_LEAST_LIMIT = 1e-4

Floats = tuple[tuple[float, ...], ...]
Ids = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Sample:
    """Some logits of a reference, and its text.

    Attributes:
        columns: of each row, ids of some tokens at the compared positions, [POSITIONS, C].
        logits: theirs, [POSITIONS, C].
        greedy, margins: see `Reference`.
    """

    columns: tuple[Ids, ...]
    logits: tuple[Floats, ...]
    greedy: Ids
    margins: Floats

    def __post_init__(self) -> None:
        shapes = [np.shape(row) for row in self.columns]
        require(shapes == [np.shape(row) for row in self.logits], "columns and logits differ in shape")
        require(all(len(row) == POSITIONS for row in self.columns), f"a row has not {POSITIONS} positions")


@dataclass(frozen=True)
class Expected:
    """What an engine is compared with.

    Attributes:
        rows: token ids of the probe's rows, the long one at last.
        long: whether there is a long row, which is prefilled in chunks.
        prompts: of greedy text.
        continuing: W, if prompts of a subject stop at an exit layer, whose logits depend on the borders of steps.
        samples: by subject.
    """

    precision: str
    rows: Ids
    long: bool
    prompts: Ids
    continuing: int | None
    samples: dict[str, Sample]

    def __post_init__(self) -> None:
        require(self.precision in ON_GPU, f"unknown precision {self.precision!r}")
        require(bool(self.rows) and all(len(row) > POSITIONS for row in self.rows), "a row is missing or too short")
        require({*self.samples} == {"original", "nbl"}, "a decoder is missing")
        for subject, sample in self.samples.items():
            require(len(sample.columns) == len(self.rows), f"rows and logits of {subject} differ in number")
            texts = (len(sample.greedy), len(sample.margins))
            require(texts == (len(self.prompts),) * 2, f"prompts and text of {subject} differ in number")


def expect(
    precision: str, probe: Probe, references: Mapping[str, Reference], continuing: int | None = None
) -> Expected:
    """Take what an engine is compared with out of the references of `probe`; `continuing`: see `Expected`."""
    samples = {subject: _sample(reference) for subject, reference in references.items()}
    rows = (*probe.rows, *([probe.long] if probe.long else []))
    return Expected(precision, rows, bool(probe.long), probe.prompts, continuing, samples)


def _sample(reference: Reference) -> Sample:
    every = (*reference.logits, *([] if reference.long is None else [reference.long]))
    compared = [logits_TV[-POSITIONS:] for logits_TV in every]
    columns = [np.array([_chosen(line_V) for line_V in logits_PV]) for logits_PV in compared]
    logits = [np.take_along_axis(*pair, 1) for pair in zip(compared, columns, strict=True)]
    return Sample(_tuples(columns), _tuples(logits), reference.greedy, reference.margins)


def _tuples(arrays: list[np.ndarray]) -> tuple[Any, ...]:
    return tuple(tuple(map(tuple, array.tolist())) for array in arrays)


def _chosen(logits_V: np.ndarray) -> np.ndarray:
    """Tokens whose logits are kept: the likeliest ones first, then others spread over the vocabulary."""
    likeliest = np.argsort(-logits_V)[:_LIKELIEST]
    spread = np.linspace(0, len(logits_V) - 1, min(2 * _KEPT, len(logits_V))).astype(np.int64)
    return np.concatenate([likeliest, np.setdiff1d(spread, likeliest)])[: min(_KEPT, len(logits_V))]


def save(expected: Expected, path: Path) -> None:
    """Write the file, complete or not at all. A reference that is not finite is refused when it is read."""
    with replacing(path) as stream:
        stream.write(json.dumps(dataclasses.asdict(expected)).encode())


def load(path: Path) -> Expected:
    """Read the file.

    Raises:
        NblError: there is no file. CorruptError: it cannot be read.
    """
    if not path.is_file():
        raise NblError(
            f"{path} is missing, which verification leaves for engines of a GPU: copy it from the machine that made "
            "the run, or run verification there again"
        )
    try:
        return read_record(Expected, read_json(path))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); copy it again, or verify again where it was made") from (
            error
        )


# -- the checks ------------------------------------------------------------------------------------------------


class _OnSlots:
    """A runner as a `StepDecoder` of one row, whose steps give the logits of the last token.

    A new sequence runs on the slots of the dropped ones, so the mask must hide their keys.
    """

    def __init__(self, runner: Any, most: int) -> None:
        self._runner = runner
        runner.begin(most)

    def begin(self, _batch: int) -> None:
        self._runner.rewind(0)

    def step(self, ids_BT: np.ndarray) -> np.ndarray:
        self._runner.append(ids_BT[0].tolist())
        return np.array(self._runner.last_logits(), np.float32)[None, None]


def checks(runner: Any, subject: str, expected: Expected, yardstick: float | None = None) -> Iterator[CheckResult]:
    """Compare a runner with what is expected of a subject, then with itself.

    Args:
        runner: a `TextRunner` with `last_logits`.
        yardstick: the largest figure of the original's engine, if the subject is another. It has the same arithmetic in
            more layers, so a multiple of it is a second limit.
    """
    tolerance = ON_GPU[expected.precision]
    limit = tolerance.limit
    if yardstick is not None:
        limit = min(limit, max(_MOST_RATIO * yardstick, _LEAST_LIMIT))
    sample = expected.samples[subject]
    decoder = _OnSlots(runner, max(map(len, expected.rows)))
    for number, row in reversed(list(enumerate(expected.rows))):  # the others run on the slots of the long one
        prefill = len(row) - DECODE_STEPS
        chunk = LONG_CHUNK if expected.long and row is expected.rows[-1] else prefill
        starts = [*range(0, prefill, chunk), *range(prefill, len(row))]
        got = run_chunks(decoder, row, starts, np.arange(prefill - 1, len(row)))
        pair = (np.take_along_axis(got, np.array(sample.columns[number]), 1), np.array(sample.logits[number]))
        yield from ladder.judge(subject, subject, f"one sequence of {len(row)} tokens", [pair], limit)
    yield _chunk_behind_cache(decoder, subject, expected)
    if expected.prompts:
        pairs = zip(expected.prompts, sample.greedy, strict=True)
        said = [runner.greedy(prompt, len(text)) for prompt, text in pairs]
        yield ladder.check_greedy(subject, said, sample.greedy, sample.margins, tolerance)
    yield _clock(runner, subject, row)


def _chunk_behind_cache(decoder: _OnSlots, subject: str, expected: Expected) -> CheckResult:
    """Check last_token: the prefill of the first row in two chunks, and its cached steps as one chunk.

    With an exit layer the prefill is one chunk, as in the reference, and the steps are chunks that continue whole.
    """
    row = expected.rows[0]
    sample = expected.samples[subject]
    prefill = len(row) - DECODE_STEPS
    starts = sorted({0, prefill // 2, prefill})
    if expected.continuing is not None:
        starts = [0, *range(prefill, len(row), expected.continuing + 1)]
    ends = [0, -1]
    got = run_chunks(decoder, row, starts, np.array([prefill - 1, len(row) - 1]))
    found = np.take_along_axis(got, np.array(sample.columns[0])[ends], 1)
    value = apart(np.array(sample.logits[0])[ends], found)
    limit = ON_GPU[expected.precision].limit
    passed = bool(np.isfinite(value) and value <= limit)
    detail = f"{len(row)} tokens in chunks that begin at {', '.join(map(str, starts))}"
    metric = "relative rms logit difference, chunk behind a cache"
    return CheckResult("last_token", subject, metric, value, limit, passed, detail)


def _clock(runner: Any, subject: str, row: Sequence[int]) -> CheckResult:
    """Reading a token behind a step takes no time that belongs to the step."""
    runner.begin(len(row))
    steps = []
    readings = []
    for token in row:
        before = time.perf_counter()
        runner.append([token])
        between = time.perf_counter()
        runner.pick()
        steps.append(between - before)
        readings.append(time.perf_counter() - between)
    step, reading = (statistics.median(seconds[_WARM_UP:]) for seconds in (steps, readings))
    share = reading / max(step, 1e-9)
    detail = f"a step takes {1000 * step:.3g} ms, reading its token afterwards {1000 * reading:.3g} ms"
    metric = "share of a step's time that reading its token takes"
    return CheckResult("clock", subject, metric, share, _MOST_READING, share <= _MOST_READING, detail)
