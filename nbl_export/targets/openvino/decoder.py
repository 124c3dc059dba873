"""An IR one step at a time, for verification: logits of a batch, as numpy arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.names import IR_FILE
from nbl_export.records.decoder import GraphContract
from nbl_export.targets.openvino.session import Session

__all__ = ["IrDecoder"]


class IrDecoder:
    """Runs batches of rows of different lengths, with the interface of `graph.decoder.OnnxDecoder`.

    Rows come padded on the right and run padded on the left, as transformers and OpenVINO GenAI pad a batch. So the
    last column of a pruned graph is each row's last token.

    Args:
        exact: see `Session`.
    """

    def __init__(
        self, directory: Path, file: str = IR_FILE, *, exact: bool = False, threads: int | None = None
    ) -> None:
        self.session = Session(directory, file, exact=exact, threads=threads)

    @property
    def contract(self) -> GraphContract:
        """Inputs, states as if they were inputs, and outputs."""
        return self.session.contract

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self.session.begin(batch)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] of each row's last token (pruned graph).

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; only a first chunk may be padded.
        """
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        shifts = ids_BT.shape[1] - valid.sum(1)
        logits = self.session.run(_rolled(ids_BT, shifts), _rolled(valid, shifts).astype(np.int64))
        return _rolled(logits, -shifts) if logits.shape[1] == ids_BT.shape[1] else logits

    def mark(self) -> Any:
        """The state of the running batch, for `rewind`; copies the caches."""
        return self.session.states(), self.session.mask_BK

    def rewind(self, mark: Any) -> None:
        """Go back to the state `mark` of the same batch."""
        self.session.put_states(*mark)

    @property
    def cache_length(self) -> int:
        """Tokens that the states of the running batch hold, padding included."""
        return int(self.session.mask_BK.shape[1])

    @property
    def cache_bytes(self) -> int:
        """See `Session.cache_bytes`."""
        return self.session.cache_bytes


def _rolled(rows: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Rows moved along axis 1, each by its own number of places."""
    if not shifts.any():
        return rows
    return np.stack([np.roll(row, int(shift), 0) for row, shift in zip(rows, shifts, strict=True)])
