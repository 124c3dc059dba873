"""Structure of a graph with int4 or int8 matrices: codes match the model's matrices, kernels multiply by the codes.

checkpoint's matrix ──(within a step of its codes)── codes ──(to float32 accuracy)── matrix that the kernel applies
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from nbl_export.records.quantised import Blocks, StoredMatrix
from nbl_export.records.results import CheckResult

__all__ = [
    "DISTANCE",
    "EXACT",
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
# Largest error of rounding to nearest, in steps: usually half a step. ONNX Runtime's symmetric quantiser spans [-8, 8)
# steps, so the mirror image of a block's largest number is a whole step off.
EXACT = 0.0  # for codes that are taken over: every value is the model's, bit for bit
NEAREST = 1.01
SEARCHED = 2.0  # for k_quant, which searches scale and zero point and may clip a block's ends: 1.1 observed
# Relative to the sum of a row's magnitudes. Float32 sums differ by 2e-7 (SmolLM2, both precisions, AVX-512). One int4
# code that is a step off in a row of 14,336 shows as 3e-5.
_SUMS = 2e-6


class Far(Protocol):
    """Distance of a graph's matrix from the model's matrix (`torch_matrices.Fidelity`)."""

    @property
    def name(self) -> str: ...
    @property
    def steps(self) -> float: ...
    @property
    def row(self) -> int: ...


def check_nearness(subject: str, found: Sequence[Far], limit: float | None) -> CheckResult:
    """Check that the codes are those of the model's matrices.

    Args:
        limit: `NEAREST` or `SEARCHED` if nbl-export quantised the graph. None only reports the distance of another
            tool's codes: such codes compensate for each other's errors and lie farther away.
    """
    worst = max(found, key=lambda f: f.steps)
    detail = f"{len(found)} matrices; the farthest is {worst.name}, row {worst.row}"
    passed = limit is None or worst.steps <= limit
    return CheckResult("structure", subject, NEARNESS, worst.steps, limit, passed, detail)


def check_products(
    subject: str, matrices: Sequence[StoredMatrix], ran: Iterable[tuple[str, np.ndarray, np.ndarray]]
) -> CheckResult:
    """Check that each node multiplies by, or looks up, the values of its codes.

    Args:
        matrices: the graph's quantised matrices.
        ran: name, input and output of each node (`verify.products`).
    """
    known = {matrix.name: matrix for matrix in matrices}
    worst, name, count = 0.0, "", 0
    for node, given, output in ran:
        error = _error(known[node].lookup, known[node].blocks(), given, output)
        count += 1
        if not error <= worst:  # true for NaN too
            worst, name = error, node
    detail = f"{count} nodes, each by itself" + (f"; the largest is of {name}" if name else "")
    return CheckResult("structure", subject, PRODUCTS, worst, _SUMS, worst <= _SUMS, detail)


def _error(lookup: bool, blocks: Blocks, given: np.ndarray, output: np.ndarray) -> float:
    matrix = blocks.coded
    if lookup:
        expected, size = matrix[given[0]], np.abs(matrix[given[0]]).sum(1, keepdims=True)
    else:
        expected, size = given @ matrix.T, np.abs(matrix).sum(1)
    away = np.abs(output.reshape(expected.shape).astype(np.float64) - expected)
    return float((away / np.maximum(size, 1e-30)).max())


def distance(subject: str, got: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> CheckResult:
    """Report the distance of logits from those of the model with unrounded matrices; no limit applies."""
    away = sum(float(np.square(g.astype(np.float64) - b).sum()) for g, b in zip(got, before, strict=True))
    size = sum(float(np.square(b.astype(np.float64)).sum()) for b in before)
    return CheckResult("quantised", subject, DISTANCE, float(np.sqrt(away / size)), None, True, "reported, not gated")
