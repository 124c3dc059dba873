"""A decoder graph on plain ONNX Runtime: prefill and cached steps of a right-padded batch, logits as numpy.

For verification, not for speed: caches and states are copied through numpy. Only the graph's inputs and outputs matter.

A float32 graph keeps its weights in the file, mapped into memory, so the kernel can drop their pages. By default ONNX
Runtime copies each matrix into another order. In float32 that changes the rounding of products alone. Quantised
matrices need it: without it they take other kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.names import GRAPH_FILE
from nbl_export.graph.session import PAST, contract_of_session, open_session
from nbl_export.records.decoder import is_state

__all__ = ["OnnxDecoder"]

_UNPACKED = "session.disable_prepacking"
_FED = ("past_key_values", "present")  # part of an input's name -> of the output that feeds it


class OnnxDecoder:
    """One decoder graph and the caches of the batch it is running.

    Args:
        directory: holds the graph.
        file: name of the graph, see `all_logits_file`.
        head_dim: size of a head, used if the graph only names that dimension.
        threads: intra-op threads; None is ONNX Runtime's choice.
        caches: name of each cache input -> of its output; None: past_key_values.N.key -> present.N.key.
        proto: the graph itself, with its data in `directory`; `file` is then not read.

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
    """

    def __init__(
        self, directory: Path, head_dim: int, threads: int | None = None, *, file: str = GRAPH_FILE,
        caches: Mapping[str, str] | None = None, proto: bytes | None = None,
    ) -> None:  # fmt: skip
        model = (directory / file).read_bytes() if proto is None else proto
        self.session = open_session(
            directory / file if proto is None else proto, threads, folder=directory if proto is not None else None,
            entries={_UNPACKED: "1"} if _is_float32(model) else None,
        )  # fmt: skip
        self.head_dim = head_dim
        self.contract = contract_of_session(self.session)
        named = [a.name for a in self.contract.inputs if PAST.match(a.name)]
        self._caches = {n: n.replace(*_FED) for n in named} if caches is None else dict(caches)
        self._states = {a.name: a.name.replace(*_FED) for a in self.contract.inputs if is_state(a.name)}
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
        states = (a for a in self.contract.inputs if a.name in self._states)
        self._past |= {a.name: np.zeros((batch, *map(int, a.shape[1:])), a.dtype) for a in states}

    def step(
        self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None, further: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], or [B, 1, V] from a pruned graph.

        Args:
            ids_BT: token ids.
            valid_BT: 1 for tokens, 0 for padding on the right; only a first chunk may be padded.
            further: values of inputs that only this graph has.
        """
        outputs = [a.name for a in self.contract.outputs]
        feeds, mask = self._feeds(ids_BT, valid_BT, further)
        found = dict(zip(outputs, self.session.run(outputs, feeds), strict=True))
        self._mask_BT = mask
        self._past = {name: found[output] for name, output in {**self._caches, **self._states}.items()}
        return np.asarray(found["logits"].astype(np.float32, copy=False))

    def look(
        self, outputs: Sequence[str], ids_BT: np.ndarray, valid_BT: np.ndarray | None = None,
        further: Mapping[str, np.ndarray] | None = None,
    ) -> list[np.ndarray]:  # fmt: skip
        """Other outputs for the tokens that would come next, without appending these tokens."""
        found: list[np.ndarray] = self.session.run(list(outputs), self._feeds(ids_BT, valid_BT, further)[0])
        return found

    def _feeds(
        self, ids_BT: np.ndarray, valid_BT: np.ndarray | None, further: Mapping[str, np.ndarray] | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """All inputs of a step, and the mask after the step."""
        valid = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        past_lengths = self._mask_BT.sum(1)
        mask = np.concatenate([self._mask_BT, valid.astype(np.int64)], 1)
        positions = past_lengths[:, None] + np.arange(ids_BT.shape[1])[None, :]
        feeds = {"input_ids": ids_BT, "attention_mask": mask, "position_ids": positions}
        types = {a.name: a.dtype for a in self.contract.inputs}
        ours = {k: v.astype(types[k], copy=False) for k, v in {**feeds, **(further or {})}.items() if k in types}
        return {**ours, **self._past}, mask

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
        """Bytes that the caches of the running batch hold now, without states of constant size."""
        return sum(self._past[name].nbytes for name in self._caches)


def _is_float32(model: bytes) -> bool:
    """Whether all numbers in a serialised graph are float32 or indices; external data is not read."""
    import onnx

    kinds = {tensor.data_type for tensor in onnx.ModelProto.FromString(model).graph.initializer}
    return kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}
