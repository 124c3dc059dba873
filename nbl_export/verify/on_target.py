"""What verification leaves for an engine on its own machine, and the checks of a runner against it.

acceptance.safetensors holds what the ladder's references say, for a machine with neither torch nor checkpoint:

    rows.{k} [T]                      token ids of the probe's short rows and of its long row
    {subject}.columns.{k} [P, C]      at the last token of the prefill and at each cached step: ids of some tokens
    {subject}.logits.{k} [P, C]       their logits, float32
    prompts.{k} [T]                   token ids of the prompts of greedy text
    {subject}.greedy, {subject}.margins [prompts, tokens]      see `Reference`
    metadata "acceptance", JSON: schema, precision, and near: W of prompts that stop at a cut, or null

The checks of the ladder, and what only a GPU can show:

    original, nbl   logits of the last token of a prefill and of 16 cached steps; short rows, and the long row in chunks
    last_token      a chunk behind a cache, on slots that hold another text
    text            greedy text
    clock           a step has its logits when it returns, so that a clock can be read
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import replacing
from nbl_export.records.results import CheckResult
from nbl_export.verify import ladder
from nbl_export.verify.ladder import DECODE_STEPS, LONG_CHUNK, ON_GPU, Probe, Reference, Tolerance, apart

__all__ = ["POSITIONS", "SUBJECTS", "Expected", "checks", "expect", "load", "save"]

SUBJECTS = ("original", "nbl")
POSITIONS = DECODE_STEPS + 1  # of each row: the last token of the prefill, and the cached steps
_LIKELIEST = 32  # tokens whose logits are kept
_KEPT = 144
_SCHEMA = 2
_METADATA = "acceptance"
_WARM_UP = 8  # steps that are not timed
_MOST_OTHER = 0.1  # of the likeliest tokens where the reference is sure
_MOST_READING = 0.25  # of the time of a step; copying logits takes far less

Arrays = dict[str, np.ndarray]
Rows = tuple[tuple[int, ...], ...]
Doing = Callable[[str, str], None]  # check, and what begins now


@dataclass(frozen=True)
class Expected:
    """What an engine is compared with.

    Attributes:
        arrays: of all subjects by name, see the module.
        near: W, if prompts of a subject stop at a cut, whose logits depend on the borders of steps.
    """

    precision: str
    rows: Rows
    prompts: Rows
    arrays: Arrays
    near: int | None = None

    @property
    def tolerance(self) -> Tolerance:
        """The limits for an engine of this precision."""
        return ON_GPU[self.precision]

    def logits(self, subject: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of tokens and their logits, [POSITIONS, C] each."""
        return self.arrays[f"{subject}.columns.{row}"], self.arrays[f"{subject}.logits.{row}"]

    def text(self, subject: str) -> tuple[list[list[int]], list[list[float]]]:
        """Greedy text of the prompts, and the margin at each token."""
        return self.arrays[f"{subject}.greedy"].tolist(), self.arrays[f"{subject}.margins"].tolist()


def expect(precision: str, probe: Probe, references: Mapping[str, Reference], near: int | None = None) -> Expected:
    """Take what an engine is compared with out of the references.

    Args:
        references: of `probe`, by subject; without text or the long row if a reference lacks it.
        near: see `Expected`.
    """
    long = all(reference.long is not None for reference in references.values())
    prompts = probe.prompts if all(reference.greedy for reference in references.values()) else ()
    arrays: Arrays = {}
    for subject, reference in references.items():
        for k, logits in enumerate((*reference.logits, *([reference.long] if long else []))):
            assert logits is not None
            compared = logits[-POSITIONS:]
            columns = np.array([_chosen(line_V) for line_V in compared], np.int32)
            arrays[f"{subject}.columns.{k}"] = columns
            arrays[f"{subject}.logits.{k}"] = np.take_along_axis(compared, columns, 1).astype(np.float32)
        if prompts:
            arrays[f"{subject}.greedy"] = np.array(reference.greedy, np.int32)
            arrays[f"{subject}.margins"] = np.array(reference.margins, np.float32)
    return Expected(precision, (*probe.rows, *([probe.long] if long else [])), prompts, arrays, near)


def _chosen(logits_V: np.ndarray) -> np.ndarray:
    """Tokens whose logits are kept: the likeliest ones first, then others spread over the vocabulary."""
    likeliest = np.argsort(-logits_V)[:_LIKELIEST]
    spread = np.linspace(0, len(logits_V) - 1, min(2 * _KEPT, len(logits_V))).astype(np.int64)
    return np.concatenate([likeliest, np.setdiff1d(spread, likeliest)])[: min(_KEPT, len(logits_V))]


def save(expected: Expected, path: Path) -> None:
    """Write the file, complete or not at all."""
    from safetensors.numpy import save as serialised

    ids = {f"rows.{k}": np.array(row, np.int32) for k, row in enumerate(expected.rows)}
    ids |= {f"prompts.{k}": np.array(row, np.int32) for k, row in enumerate(expected.prompts)}
    stated = {"schema": _SCHEMA, "precision": expected.precision, "near": expected.near}
    with replacing(path) as stream:
        stream.write(serialised({**ids, **expected.arrays}, metadata={_METADATA: json.dumps(stated)}))


def load(path: Path) -> Expected:
    """Read the file.

    Raises:
        NblError: there is no file. CorruptError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NblError(
            f"{path} is missing, which verification leaves for engines of a GPU: copy it from the machine that made "
            "the run, or run verification there again"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            stated = json.loads((file.metadata() or {})[_METADATA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stated["schema"] != _SCHEMA:
            raise ValueError(f"schema {stated['schema']}, this version reads {_SCHEMA}")
        rows = _taken(arrays, "rows")
        prompts = _taken(arrays, "prompts")
        near = stated.get("near")
        found = Expected(str(stated["precision"]), rows, prompts, arrays, None if near is None else int(near))
        _check(found)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); copy it again, or verify again where it was made") from (
            error
        )
    return found


def _taken(arrays: Arrays, kind: str) -> Rows:
    """Take the token ids of one kind out of the arrays."""
    count = sum(name.startswith(f"{kind}.") for name in arrays)
    return tuple(tuple(map(int, arrays.pop(f"{kind}.{k}"))) for k in range(count))


def _check(expected: Expected) -> None:
    """Raise ValueError or KeyError unless all arrays are there and fit together."""
    _ = expected.tolerance
    for subject in SUBJECTS:
        for k, row in enumerate(expected.rows):
            columns, logits = expected.logits(subject, k)
            if len(row) < POSITIONS or columns.shape != logits.shape or len(columns) != POSITIONS:
                raise ValueError(f"row {k} of {subject} does not fit its logits")
        if expected.prompts and not len(expected.prompts) == len(expected.text(subject)[0]):
            raise ValueError(f"prompts and text of {subject} differ in number")
    if not expected.rows:
        raise ValueError("it has no rows")


# -- the checks ------------------------------------------------------------------------------------------------


def checks(
    runner: Any, subject: str, expected: Expected, doing: Doing, yardstick: float | None = None
) -> Iterator[CheckResult]:
    """Compare a runner with what is expected of a subject, then with itself.

    Args:
        runner: a `TextRunner` with `last_logits`.
        yardstick: the largest figure of the original's engine, if the subject is another; see `Tolerance.ratio`.
    """
    check = subject
    limit = expected.tolerance.limit
    if yardstick is not None and expected.tolerance.ratio is not None:
        limit = min(limit, max(yardstick * expected.tolerance.ratio, 1e-4))
    sure: list[np.ndarray] = []
    for k, row in enumerate(expected.rows):
        name = f"one sequence of {len(row)} tokens"
        doing(check, f"running {name}")
        columns, logits = expected.logits(subject, k)
        got = np.take_along_axis(_appended(runner, _parts(row)), columns, 1)
        yield from ladder.judge(check, subject, name, [(got, logits)], limit)
        sure.append(_keeps_best(got, logits, expected.tolerance.greedy_margin))
    yield _best_tokens(check, subject, np.concatenate(sure))
    yield _chunk_behind_cache(runner, subject, expected, doing)
    if expected.prompts:
        doing("text", "generating text")
        texts, margins = expected.text(subject)
        said = [runner.greedy(prompt, len(text)) for prompt, text in zip(expected.prompts, texts, strict=True)]
        yield ladder.check_greedy(subject, said, texts, margins, expected.tolerance)
    doing("clock", "timing steps")
    yield _clock(runner, subject, expected.rows[0])


def _keeps_best(got: np.ndarray, logits: np.ndarray, margin: float) -> np.ndarray:
    """Whether the likeliest token is the reference's, at each position where the reference is sure by the margin."""
    second, best = np.sort(logits, 1)[:, -2:].T
    return (got.argmax(1) == logits.argmax(1))[best - second > margin]


def _best_tokens(check: str, subject: str, kept: np.ndarray) -> CheckResult:
    share = 1 - float(kept.mean()) if len(kept) else 0.0
    detail = f"{int(kept.sum())} of {len(kept)} likeliest tokens are the reference's, where it is sure"
    return CheckResult(
        check, subject, "share of other likeliest tokens", share, _MOST_OTHER, share <= _MOST_OTHER, detail
    )


def _parts(row: Sequence[int]) -> list[Sequence[int]]:
    """The prefill in chunks, then single tokens."""
    prefill = len(row) - DECODE_STEPS
    return [*(row[k : min(k + LONG_CHUNK, prefill)] for k in range(0, prefill, LONG_CHUNK)), *_singles(row[prefill:])]


def _singles(row: Sequence[int]) -> list[Sequence[int]]:
    return [[token] for token in row]


def _appended(runner: Any, parts: Sequence[Sequence[int]], *, begun: bool = False) -> np.ndarray:
    """Logits [N, V] after the last parts, at most POSITIONS; in a new sequence unless it has begun."""
    if not begun:
        runner.begin(sum(map(len, parts)))
    found = []
    for number, part in enumerate(parts):
        runner.append(part)
        if number >= len(parts) - POSITIONS:
            found.append(np.array(runner.last_logits(), np.float32))
    return np.stack(found)


def _chunk_behind_cache(runner: Any, subject: str, expected: Expected, doing: Doing) -> CheckResult:
    """Check last_token: the prefill of the first row in two chunks, and its cached steps as one chunk.

    The longest row ran before and was dropped, so the mask must hide its slots.

    With a cut the prefill is one chunk, as in the reference, and the steps are chunks that climb whole.
    """
    doing("last_token", "running a chunk behind a cache")
    row = expected.rows[0]
    prefill = len(expected.rows[0]) - DECODE_STEPS
    if expected.near is None:
        bounds = sorted({0, prefill // 2, prefill, len(row)})
    else:
        bounds = [0, *range(prefill, len(row), expected.near + 1), len(row)]
    parts = [row[start:end] for start, end in itertools.pairwise(bounds)]
    columns, logits = (array[[0, -1]] for array in expected.logits(subject, 0))
    places = [bounds.index(prefill) - 1, -1]
    other = max(expected.rows, key=len)
    runner.begin(len(other))
    _appended(runner, _parts(other), begun=True)
    runner.rewind(0)
    got = np.take_along_axis(_appended(runner, parts, begun=True)[places], columns, 1)
    value = apart(logits, got)
    limit = expected.tolerance.limit
    passed = bool(np.isfinite(value) and value <= limit)
    detail = f"chunks of {', '.join(str(len(part)) for part in parts)} tokens, on slots of another text"
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
