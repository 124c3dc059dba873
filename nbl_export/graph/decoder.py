"""A decoder graph on plain ONNX Runtime: prefill and cached steps of a right-padded batch, logits as numpy.

For verification, not for speed: caches are copied through numpy. Only the graph's inputs and outputs matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.session import PAST, contract_of_session, open_session

__all__ = ["OnnxDecoder"]

_FED = ("past_key_values", "present")  # part of an input's name -> of the output that feeds it


class OnnxDecoder:
    """One decoder graph and the caches of the batch it is running.

    Args:
        directory: holds the graph.
        file: name of the graph, see `all_logits_file`.
        head_dim: size of a head, used if the graph only names that dimension.
        threads: intra-op threads; None is ONNX Runtime's choice.
        caches: name of each cache input -> of its output; None: past_key_values.N.key -> present.N.key.
        exact: see `open_session`.
        session: runs in place of a session of the graph (`mixed.MixedSession`); `directory` is then not read.

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self, directory: Path, head_dim: int, threads: int | None = None, *, file: str = GRAPH_FILE,
        caches: Mapping[str, str] | None = None, exact: bool = False, session: Any = None,
    ) -> None:  # fmt: skip
        self.session = session or open_session(directory / file, threads, mapped=True, exact=exact)
        self.head_dim = head_dim
        self.contract = contract_of_session(self.session)
        named = [a.name for a in self.contract.inputs if PAST.match(a.name)]
        self._caches = {n: n.replace(*_FED) for n in named} if caches is None else dict(caches)
        self._past: dict[str, np.ndarray] = {}
        self._mask_BT = np.zeros((0, 0), np.int64)

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self._mask_BT = np.zeros((batch, 0), np.int64)
        self._past = {
            a.name: np.zeros((batch, int(a.shape[1]), 0, self.head_dim), a.dtype)
            for a in self.contract.inputs
            if a.name in self._caches
        }

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] from a pruned graph.

        Logits of rows that a graph with a cut (`mixers.predicted`) does not compute are NaN.

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; only a first chunk may be padded.
        """
        logits = self.run(ids_BT, valid_BT)["logits"].astype(np.float32, copy=False)
        return _in_place(logits, np.ones_like(ids_BT) if valid_BT is None else valid_BT)

    def run(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """All outputs of a step by name; arguments as in `step`."""
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        positions = self._mask_BT.sum(1)[:, None] + np.arange(ids_BT.shape[1])[None, :]
        mask = np.concatenate([self._mask_BT, valid.astype(np.int64)], 1)
        feeds = {"input_ids": ids_BT, "attention_mask": mask, "position_ids": positions}
        types = {a.name: a.dtype for a in self.contract.inputs}
        ours = {name: value.astype(types[name], copy=False) for name, value in feeds.items() if name in types}
        outputs = [a.name for a in self.contract.outputs]
        found = dict(zip(outputs, self.session.run(outputs, {**ours, **self._past}), strict=True))
        self._mask_BT = mask
        self._past = {name: found[output] for name, output in self._caches.items()}
        return found

    def overwrite(self, cache: str, last_BHTD: np.ndarray) -> None:
        """Replace the last rows of a cache, by the name of its input."""
        held = self._past[cache]
        kept = held[:, :, : held.shape[2] - last_BHTD.shape[2]]
        self._past[cache] = np.concatenate([kept, last_BHTD.astype(held.dtype)], 2)

    def mark(self) -> Any:
        """The state of the running batch, for `rewind`. Costs nothing: a step makes new caches and changes none."""
        return dict(self._past), self._mask_BT

    def rewind(self, mark: Any) -> None:
        """Go back to the state `mark` of the same batch."""
        past, self._mask_BT = mark
        self._past = dict(past)

    @property
    def cache_length(self) -> int:
        """Tokens that the caches of the running batch hold, padding included."""
        return int(self._mask_BT.shape[1])

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch hold now."""
        return sum(self._past[name].nbytes for name in self._caches)


def _in_place(logits_BMV: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of a graph that gives those of each row's first token and of its last tokens alone."""
    (batch, given, vocab), tokens = logits_BMV.shape, valid_BT.shape[1]
    if given in (1, tokens):
        return logits_BMV
    found = np.full((batch, tokens, vocab), np.nan, np.float32)
    found[:, 0] = logits_BMV[:, 0]
    for row, length in enumerate(valid_BT.sum(1)):
        found[row, length - given + 1 : length] = logits_BMV[row, 1:]
    return found
