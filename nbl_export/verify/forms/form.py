"""What the ladder asks of a graph format: a format checks its own files, the rungs on logits are the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbl_export.records.plan import AffineMap
from nbl_export.records.results import RungResult
from nbl_export.verify.coded import Coded
from nbl_export.verify.setting import Setting

__all__ = ["Form", "Material", "measured_cache"]


@dataclass(frozen=True)
class Material:
    """What a format checks its files with: settings, maps, rows of the token table (or None), a row of token ids."""

    setting: Setting
    maps: Mapping[int, AffineMap]
    rows_VD: Any
    row: Sequence[int]
    precision: str


class Form(Protocol):
    """Checks of one graph format."""

    def coded(
        self, setting: Setting, directories: Mapping[str, Path], results: list[RungResult], scratch: Path
    ) -> dict[str, Coded]:
        """See `coded.coded_graphs`."""

    def check(self, subject: str, directory: Path, decoder: Any, material: Material) -> list[RungResult]:
        """Rungs a and f of a directory; `decoder` runs its graph with the most logits."""

    def check_untouched(self, directories: Mapping[str, Path]) -> list[RungResult]:
        """Check that the NBL graph has the original's weights."""


def measured_cache(subject: str, decoder: Any, head_dim: int) -> RungResult:
    """Rung a: cache bytes that a running session holds for two sequences."""
    decoder.begin(2)
    decoder.step(np.zeros((2, 1), np.int64))
    per_token = decoder.cache_bytes // (2 * decoder.slots)
    stated = decoder.contract.cache_bytes_per_token(head_dim)
    detail = f"{per_token} bytes a token held after a step, {stated} by contract"
    return RungResult(
        "a", subject, "cache bytes in the running session", float(per_token != stated), 0.5, per_token == stated, detail
    )
