"""A decoder graph on plain ONNX Runtime: prefill and cached steps of a right-padded batch, logits as numpy.

    inputs beside input_ids            caches
    attention_mask, position_ids       grow by each step, padding included
    write_indices, num_tokens          the static form: of a fixed length; each row writes behind its own tokens

For verification, not for speed: caches are copied through numpy. Only the graph's inputs and outputs matter.

Rules of the static form that a graph needs and cannot check:
- Caches start zeroed: masked slots are multiplied by 0, and 0 x NaN is NaN.
- T of a step is at most the free slots of every row, resting rows included (TensorRT's KVCacheUpdate: what lies beyond
  is undefined).
- Padding is written behind a row's tokens. The next step overwrites it before any token reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.session import PAST, contract_of_session, open_session, returning_memory

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
        fp32_activations: see `open_session`; runs return their memory.
        session: runs in place of a session of the graph (`mixed.MixedSession`); `directory` is then not read.
        chunk: most tokens of a run; a longer step is several runs. None for any number. For graphs of the static form.

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
        NblError: the graph has write_indices, and caches whose length is not a number.
    """

    def __init__(
        self,
        directory: Path,
        head_dim: int,
        threads: int | None = None,
        *,
        file: str = GRAPH_FILE,
        caches: Mapping[str, str] | None = None,
        fp32_activations: bool = False,
        session: Any = None,
        chunk: int | None = None,
    ) -> None:
        self.session = session or open_session(
            directory / file, threads, mapped=True, fp32_activations=fp32_activations
        )
        self._options = [returning_memory()] if fp32_activations else []
        self.head_dim = head_dim
        self._chunk = chunk
        self.contract = contract_of_session(self.session)
        self._types = {a.name: a.dtype for a in self.contract.inputs}
        named = [name for name in self._types if PAST.match(name)]
        self._caches = {n: n.replace(*_FED) for n in named} if caches is None else dict(caches)
        self._slots = 0  # of a cache of fixed length
        if "write_indices" in self._types:
            slots = next((a.shape[2] for a in self.contract.inputs if a.name in self._caches), None)
            if not isinstance(slots, int):
                raise NblError(f"{directory / file} is not of the static form: its caches have no fixed length")
            self._slots = slots
        self._past: dict[str, np.ndarray] = {}
        self._mask_BT = np.zeros((0, 0), np.int64)

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self._mask_BT = np.zeros((batch, 0), np.int64)
        self._past = {}
        for a in (a for a in self.contract.inputs if a.name in self._caches):
            size = a.shape[3] if isinstance(a.shape[3], int) else self.head_dim
            self._past[a.name] = np.zeros((batch, int(a.shape[1]), self._slots, size), a.dtype)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] of each row's last token from a pruned graph.

        Logits of rows that a graph with an exit layer (`methods.predicted_kv.maps`) does not compute are NaN.

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; only a first step may be padded, or any in the static
                form.

        Raises:
            NblError: a row would outgrow a cache of fixed length; nothing has run.
        """
        valid_BT = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        held = int(self._mask_BT.sum(1).max())
        tokens = ids_BT.shape[1]
        if self._slots and held + tokens > self._slots:
            raise NblError(f"{held} tokens are cached and {tokens} more do not fit into {self._slots} slots")
        width = self._chunk or tokens
        found = self._logits(ids_BT[:, :width], valid_BT[:, :width])
        for start in range(width, tokens, width):
            valid = valid_BT[:, start : start + width]
            logits = self._logits(ids_BT[:, start : start + width], valid)
            if self.contract.logits == "last":
                found = np.where(valid[:, :1, None] > 0, logits, found)
            else:
                found = np.concatenate([found, logits], 1)
        return found

    def _logits(self, ids_BT: np.ndarray, valid_BT: np.ndarray) -> np.ndarray:
        return _in_place(self.run(ids_BT, valid_BT)["logits"].astype(np.float32, copy=False), valid_BT)

    def run(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """All outputs of one run by name; arguments as in `step`."""
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        lengths_B = self._mask_BT.sum(1)
        mask = np.concatenate([self._mask_BT, valid.astype(np.int64)], 1)
        feeds = {
            "input_ids": ids_BT,
            "attention_mask": mask,
            "write_indices": lengths_B,
            "num_tokens": valid.sum(1),
            "position_ids": lengths_B[:, None] + np.arange(ids_BT.shape[1])[None, :],
        }
        ours = {n: value.astype(self._types[n], copy=False) for n, value in feeds.items() if n in self._types}
        outputs = [a.name for a in self.contract.outputs]
        made = self.session.run(outputs, {**ours, **self._past}, *self._options)
        found = dict(zip(outputs, made, strict=True))
        self._mask_BT = mask
        self._past = {name: found[output] for name, output in self._caches.items()}
        return found

    def overwrite(self, cache: str, last_BHTD: np.ndarray) -> None:
        """Replace the last rows of a cache of unpadded sequences, by the name of its input."""
        held = self._past[cache].copy()
        held[:, :, self.length - last_BHTD.shape[2] : self.length] = last_BHTD
        self._past[cache] = held

    def mark(self) -> Any:
        """The state of the running batch, for `rewind`. Costs nothing: a step makes new caches and changes none."""
        return dict(self._past), self._mask_BT

    def rewind(self, mark: Any) -> None:
        """Go back to the state `mark` of the same batch."""
        past, self._mask_BT = mark
        self._past = dict(past)

    @property
    def length(self) -> int:
        """Tokens that the running batch has got, padding included."""
        return int(self._mask_BT.shape[1])

    @property
    def cache_length(self) -> int:
        """Tokens that a row of the caches has room for."""
        return self._slots or self.length

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
        first = max(1, int(length) - given + 1)
        found[row, first : first + given - 1] = logits_BMV[row, 1:]
    return found
