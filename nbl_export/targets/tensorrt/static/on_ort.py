"""The static form on ONNX Runtime's CPU provider, with caches updated in place: verification without a GPU.

    past_key_values.i.key  <- bind_ortvalue_input  --+
                                                     +-- one OrtValue, zeroed
    present.i.key          -> bind_ortvalue_output --+

Measured with onnxruntime 1.32:
- If past and present are bound to one buffer, TensorScatter writes in place, for chunks too. With two buffers it copies
  the cache and logs this for each scatter and step.
- The CPU provider has no MatMul for bf16.
- By default a block DequantizeLinear + MatMul is fused to MatMulNBits with int8 activations (logits off by up to 1).
  `session.qdq_matmulnbits_accuracy_level` 1 keeps float32 activations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError, MissingPackageError, NblError
from nbl_export.graph.trust import check_graph_file
from nbl_export.records.decoder import GraphContract, TensorInfo
from nbl_export.targets.tensorrt.static.host import StaticDecoder, StaticRunner

__all__ = ["OrtSession", "open_decoder", "open_runner", "session_contract"]

_PAST = re.compile(r"^past_key_values\.(\d+)\.(key|value)$")
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
           "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}  # fmt: skip
_FLOAT32_ACTIVATIONS = "1"


class OrtSession:
    """A graph of the static form and its caches (a `host.Session`).

    Args:
        path: the graph, with its data beside it.
        chunk: most tokens of a step; None runs whole prompts.
        threads: intra-op threads; None is ONNX Runtime's choice.

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
        NblError: the graph is not of the static form, or is bf16.
    """

    def __init__(self, path: Path, chunk: int | None = None, threads: int | None = None) -> None:
        self._ort, self._session = _load(path, threads)
        self.contract = session_contract(self._session)
        caches = [info for info in self.contract.inputs if _PAST.match(info.name)]
        names = {info.name for info in self.contract.inputs}
        if not caches or "write_indices" not in names or not isinstance(caches[0].shape[2], int):
            raise NblError(f"{path} is not of the static form: its caches have no fixed length")
        self.slots = caches[0].shape[2]
        self.chunk = min(chunk or self.slots, self.slots)
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
        """Run one step; returns float32 logits."""
        binding = self._session.io_binding()
        controls = {"input_ids": ids_BT, "write_indices": np.array(writes, np.int64),
                    "num_tokens": np.array(counts, np.int64)}  # fmt: skip
        for name, array in controls.items():
            if name in self._names:
                binding.bind_cpu_input(name, array)
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise NblError(f"{self._path} failed on a step of {ids_BT.shape[1]} tokens: {_short(error)}") from error
        logits: np.ndarray = binding.get_outputs()[-1].numpy()
        return logits.astype(np.float32)

    def read_cache(self, name: str) -> np.ndarray:
        """A copy of one cache of the running batch, [B, Hkv, S, head], by the name of its input."""
        return np.array(self._caches[name].numpy())

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches of the running batch take."""
        return self._bytes

    def close(self) -> None:
        """Free caches and session."""
        self._caches, self._session = {}, None


def _load(path: Path, threads: int | None) -> tuple[Any, Any]:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "cpu", "running the graph") from error
    check_graph_file(path)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # only the exception raised here reports an error
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT32_ACTIVATIONS)
    if threads:
        options.intra_op_num_threads = threads
    try:
        return ort, ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's own exception types, one for each kind of damage
        if "NOT_IMPLEMENTED" in str(error):
            raise NblError(
                f"ONNX Runtime's CPU provider has no kernel for {path} (bf16?); its float32 copy runs: {_short(error)}"
            ) from error
        raise CorruptError(f"ONNX Runtime cannot load {path}: {_short(error)}") from error


def _short(error: Exception) -> str:
    """The error as one line; a long message keeps its end, where ONNX Runtime puts the cause."""
    return " ".join(str(error).split())[-300:]


def session_contract(session: Any) -> GraphContract:
    """Inputs, outputs and cache ids of a loaded session."""

    def info(arg: Any) -> TensorInfo:
        dims = tuple(d if isinstance(d, int) else str(d) for d in arg.shape)
        return TensorInfo(arg.name, _DTYPES.get(arg.type, arg.type), dims)

    inputs = tuple(info(a) for a in session.get_inputs())
    layers = sorted({int(m[1]) for a in inputs if (m := _PAST.match(a.name))})
    return GraphContract(inputs, tuple(info(a) for a in session.get_outputs()), tuple(layers))


def open_decoder(path: Path, chunk: int | None = None, threads: int | None = None) -> StaticDecoder:
    """Open a graph of the static form for verification."""
    return StaticDecoder(OrtSession(path, chunk, threads))


def open_runner(path: Path, chunk: int | None = None, threads: int | None = None) -> StaticRunner:
    """Open a graph of the static form for text; tokenizer files lie beside it."""
    return StaticRunner(OrtSession(path, chunk, threads), path.parent)
