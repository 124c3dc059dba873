"""Rung a of a graph with int4 or int8 matrices: the codes are the model's matrices, and kernels multiply by the codes.

checkpoint's matrix ──(within a step of its codes)── codes ──(to float32 accuracy)── what the kernel multiplies by
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from nbl_export.nbits import Blocks, StoredMatrix
from nbl_export.records import RungResult

__all__ = [
    "DISTANCE",
    "NEAREST",
    "NEARNESS",
    "PRODUCTS",
    "SEARCHED",
    "TWIN",
    "Far",
    "check_nearness",
    "check_products",
    "distance",
]

# Metrics of this file's results.
NEARNESS = "steps between a matrix and its codes"
PRODUCTS = "error of quantised products, of the sum of magnitudes"
DISTANCE = "relative rms distance from the model before rounding"
TWIN = "float32 twin"
# Steps that rounding to nearest is off by: half of one, and a whole one for the mirror image of a block's largest
# number, since ONNX Runtime's symmetric quantiser spans [-8, 8) of them.
NEAREST = 1.01
SEARCHED = 2.0  # where scale and zero point were searched for (k_quant), which may cut a block's ends off: 1.1 seen
# Of the sum of a row's magnitudes: float32 sums differ by 2e-7 (SmolLM2, both precisions, AVX-512); one int4 code that
# is a step off in a row of 14,336 shows as 3e-5.
_SUMS = 2e-6


class Far(Protocol):
    """How far a graph's matrix is from the model's (`torch_matrices.Fidelity`)."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> float: ...
    @property
    def row(self) -> int: ...


def check_nearness(subject: str, found: Sequence[Far], limit: float | None) -> RungResult:
    """The codes are those of the model's matrices.

    Args:
        limit: `NEAREST` or `SEARCHED` where the graph was quantised here; None reports the distance of another tool's
            codes, which make up for each other's errors and lie farther away.
    """
    worst = max(found, key=lambda f: f.steps)
    detail = f"{len(found)} matrices; the farthest is {worst.name}, row {worst.row}"
    passed = limit is None or worst.steps <= limit
    return RungResult("a", subject, NEARNESS, worst.steps, limit, passed, detail)


def check_products(
    subject: str, matrices: Sequence[StoredMatrix], ran: Iterable[tuple[str, np.ndarray, np.ndarray]]
) -> RungResult:
    """Each node multiplies by, or looks up, what its codes stand for.

    Args:
        matrices: of the graph, as they are unpacked here.
        ran: of each node its name, what it was given and what it gave (`engines.ort_products`).
    """
    known = {matrix.name: matrix for matrix in matrices}
    worst, name, count = 0.0, "", 0
    for node, given, output in ran:
        error = _error(known[node].lookup, known[node].blocks(), given, output)
        count += 1
        if not error <= worst:  # not a number, too
            worst, name = error, node
    detail = f"{count} nodes, each by itself" + (f"; the largest is of {name}" if name else "")
    return RungResult("a", subject, PRODUCTS, worst, _SUMS, worst <= _SUMS, detail)


def _error(lookup: bool, blocks: Blocks, given: np.ndarray, output: np.ndarray) -> float:
    matrix = blocks.matrix
    if lookup:
        expected, size = matrix[given[0]], np.abs(matrix[given[0]]).sum(1, keepdims=True)
    else:
        expected, size = given @ matrix.T, np.abs(matrix).sum(1)
    away = np.abs(output.reshape(expected.shape).astype(np.float64) - expected)
    return float((away / np.maximum(size, 1e-30)).max())


def distance(subject: str, got: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> RungResult:
    """Reported: how far logits are from those of the model before its matrices were rounded."""
    away = sum(float(np.square(g.astype(np.float64) - b).sum()) for g, b in zip(got, before, strict=True))
    size = sum(float(np.square(b.astype(np.float64)).sum()) for b in before)
    return RungResult("g", subject, DISTANCE, float(np.sqrt(away / size)), None, True, "reported, not gated")
