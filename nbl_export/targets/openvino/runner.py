"""Runs a directory with OpenVINO: the TextRunner of the engine.

    directory (openvino_model.xml, .bin, config.json, tokenizer.json)
        └─ OpenVinoRunner ── begin ─ append ─ append ─ rewind ─ append ...        for bench
                         └── encode ─ stream | greedy                            for generate and verify

The tokens go through `openvino` itself, not through OpenVINO GenAI: bench and verify need the logits and a rewind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nbl_export.graph.ir.anatomy import context_length
from nbl_export.graph.ir.session import Session
from nbl_export.targets.tokenizer import TextGenerationMixin

__all__ = ["OpenVinoRunner"]


class OpenVinoRunner(TextGenerationMixin):
    """A loaded IR directory. The directory is only read.

    Raises:
        NblError: the directory is not a model that loads; the message has the path.
    """

    def __init__(self, directory: Path, threads: int | None = None) -> None:
        self.directory = directory
        self.context_length = context_length(directory)
        self.session = Session(directory, threads=threads)
        self._logits = np.zeros((1, 1, 1), np.float32)
        self._capacity = 0

    def __exit__(self, *exc: object) -> None:
        self.session.close()

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; states grow as tokens come, so nothing is reserved."""
        self._capacity = min(max_tokens, self.context_length)
        self.session.begin(1)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk.

        Raises:
            NblError: the sequence would outgrow what `begin` allowed, or OpenVINO fails.
        """
        ids_BT = np.asarray(ids, np.int64)[None]
        self.check_room(self.session.mask_BK.shape[1] + ids_BT.shape[1], self._capacity)
        self._logits = self.session.run(ids_BT, np.ones_like(ids_BT))

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens; copies the states."""
        if not 0 <= length <= self.session.mask_BK.shape[1]:
            raise ValueError(f"cannot rewind {self.session.mask_BK.shape[1]} tokens to {length}")
        self.session.cut(length)

    def last_logits(self) -> np.ndarray:
        return np.asarray(self._logits[0, -1], np.float32)
