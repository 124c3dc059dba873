"""The static form on ONNX Runtime's CPU provider, with caches updated in place: verification without a GPU.

    past_key_values.i.key  <- bind_ortvalue_input  --+
                                                     +-- one OrtValue, zeroed
    present.i.key          -> bind_ortvalue_output --+

Measured with onnxruntime 1.32:
- If past and present are bound to one buffer, TensorScatter writes in place, for chunks too. With two buffers it copies
  the cache and logs this for each scatter and step.
- The CPU provider has no MatMul for bf16.
- By default a block DequantizeLinear + MatMul is fused to MatMulNBits with int8 activations (logits off by up to 1).
  The argument `exact` of `open_session` keeps float32 activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, one_line
from nbl_export.graph.mixed import MixedSession
from nbl_export.graph.session import PAST, contract_of_session, import_onnxruntime, open_session
from nbl_export.targets.tensorrt.static.host import StaticDecoder, StaticRunner

__all__ = ["OrtSession", "open_decoder", "open_runner"]


class OrtSession:
    """A graph of the static form and its caches (a `host.Session`).

    Args:
        path: the graph, with its data beside it.
        chunk: most tokens of a step; None runs whole prompts.
        threads: intra-op threads; None is ONNX Runtime's choice.
        mixed: runs in place of a session of the graph.

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
        NblError: the graph is not of the static form, or is bf16.
    """

    widths: tuple[int, ...] = ()

    def __init__(
        self, path: Path, chunk: int | None = None, threads: int | None = None, mixed: MixedSession | None = None
    ) -> None:
        self._ort, self._mixed = import_onnxruntime(), mixed
        self._session: Any = mixed or open_session(path, threads, exact=True)
        self.contract = contract_of_session(self._session)
        caches = [info for info in self.contract.inputs if PAST.match(info.name)]
        names = {info.name for info in self.contract.inputs}
        if not caches or "write_indices" not in names or not isinstance(caches[0].shape[2], int):
            raise NblError(f"{path} is not of the static form: its caches have no fixed length")
        self.cache_length = caches[0].shape[2]
        self.chunk = min(chunk or self.cache_length, self.cache_length)
        self._path, self._names = path, names
        self._cache_info = caches
        self._caches: dict[str, Any] = {}
        self._bytes = 0

    def begin(self, batch: int) -> None:
        """Zero the caches for a batch."""
        zeros = {i.name: np.zeros((batch, *map(int, i.shape[1:])), i.dtype) for i in self._cache_info}
        self._bytes = sum(array.nbytes for array in zeros.values())
        self._caches = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in zeros.items()}

    def run(self, ids_BT: np.ndarray, writes: Sequence[int], counts: Sequence[int]) -> np.ndarray:
        """Run one step; returns logits in the graph's type."""
        controls = {"input_ids": ids_BT, "write_indices": np.array(writes, np.int64),
                    "num_tokens": np.array(counts, np.int64)}  # fmt: skip
        controls = {name: array for name, array in controls.items() if name in self._names}
        if self._mixed is not None:
            return self._run_parts(self._mixed, controls)
        binding = self._session.io_binding()
        for name, array in controls.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise NblError(f"{self._path} failed on a step of {ids_BT.shape[1]} tokens: {one_line(error)}") from error
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits

    def _run_parts(self, mixed: MixedSession, controls: dict[str, np.ndarray]) -> np.ndarray:
        caches = {name: cache.numpy() for name, cache in self._caches.items()}
        presents = [name.replace("past_key_values", "present") for name in caches]
        logits, *found = mixed.run(["logits", *presents], {**controls, **caches})
        for cache, array in zip(self._caches.values(), found, strict=True):
            cache.update_inplace(array)
        return logits

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take."""
        return self._bytes

    def close(self) -> None:
        """Free caches and session."""
        self._caches, self._session = {}, None


def open_decoder(path: Path, chunk: int | None = None, threads: int | None = None) -> StaticDecoder:
    """Open a graph of the static form for verification."""
    return StaticDecoder(OrtSession(path, chunk, threads))


def open_runner(path: Path, chunk: int | None = None, threads: int | None = None) -> StaticRunner:
    """Open a graph of the static form for text; tokenizer files lie beside it."""
    return StaticRunner(OrtSession(path, chunk, threads), path.parent)
