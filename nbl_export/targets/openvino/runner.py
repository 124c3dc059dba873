"""Runs a directory with OpenVINO: the TextRunner of the engine.

    directory (openvino_model.xml, .bin, config.json, tokenizer.json)
        └─ OpenVinoRunner ── begin ─ append ─ append ─ rewind ─ append ...        for bench
                         └── encode ─ stream | greedy                            for generate and verify

The tokens go through `openvino` itself, not through OpenVINO GenAI: bench and verify need the logits and a rewind. The
graph is in the form of OpenVINO GenAI's default back end (`graph.ir.paged`), or the stateful one if there is no such
form, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.anatomy import context_length
from nbl_export.graph.ir.paged import PagedIr
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
        self._session = _opened(directory, threads)
        self._last_V = np.zeros(1, np.float32)
        self._length = 0
        self._capacity = 0

    def __exit__(self, *exc: object) -> None:
        self._session.close()

    def begin(self, max_tokens: int) -> None:
        """Forget the sequence; make room for the next one."""
        self._capacity = min(max_tokens, self.context_length)
        self._length = 0
        self._session.begin(self._capacity if isinstance(self._session, PagedIr) else 1)

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk.

        Raises:
            NblError: the sequence would outgrow what `begin` allowed, or OpenVINO fails.
        """
        self.check_room(self._length + len(ids), self._capacity)
        ids_T = np.asarray(ids, np.int64)
        if isinstance(self._session, PagedIr):
            self._last_V = self._session.step({0: ids_T}, np.array([len(ids) - 1]))[0]
        else:
            self._last_V = self._session.run(ids_T[None], np.ones_like(ids_T[None]))[0, -1]
        self._length += len(ids)

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot rewind {self._length} tokens to {length}")
        if isinstance(self._session, PagedIr):
            self._session.lengths[0] = length
        else:
            self._session.cut(length)
        self._length = length

    def last_logits(self) -> np.ndarray:
        return self._last_V


def _opened(directory: Path, threads: int | None) -> PagedIr | Session:
    try:
        return PagedIr(directory, threads=threads)
    except RefusalError:
        return Session(directory, threads=threads)
