"""Opens a graph in ONNX Runtime on the CPU: the one place for its options, its element types and its errors."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, MissingPackageError, NblError, one_line
from nbl_export.graph.fp32_activations import keep_fp32_activations
from nbl_export.graph.rowwise import session_entries
from nbl_export.graph.trust import read_proto
from nbl_export.records.decoder import GraphContract, TensorInfo

__all__ = ["PAST", "contract_of_session", "import_onnxruntime", "open_session", "returning_memory"]

PAST = re.compile(r"^past_key_values\.(\d{1,9})\.(key|value)$")

_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16",
           "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(bool)": "bool"}  # fmt: skip
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_SILENT = 4  # severity "fatal": only the exception raised here reports an error
_UNPACKED = "session.disable_prepacking"


def import_onnxruntime() -> Any:
    """The package onnxruntime.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "cpu", "running the graph") from error
    return onnxruntime


def returning_memory() -> Any:
    """Options of a run that returns its memory at its end; by default a session keeps that of its largest run.

    On the 8B shape in int4, nine parts of a reference took 23 GB without it, and 15 GB with it.
    """
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def open_session(
    graph: Path | bytes,
    threads: int | None = None,
    *,
    folder: Path | None = None,
    entries: Mapping[str, str] | None = None,
    mapped: bool = False,
    fp32_activations: bool = False,
) -> Any:
    """An InferenceSession on the CPU provider. Memory of closed sessions goes back to the system first (`_trim`).

    Args:
        graph: a file, which is checked first (`graph.trust`), or a serialised model.
        threads: intra-op threads; None is ONNX Runtime's choice.
        folder: of a serialised model's external data.
        entries: further entries of the session's configuration.
        mapped: a float32 graph keeps its weights in the file, mapped into memory, so the kernel can drop their pages.
            By default ONNX Runtime copies each matrix into another order. In float32 that changes the rounding of
            products alone. Quantised matrices need it: without it they take other kernels.
        fp32_activations: products with quantised matrices do not round activations (`graph.fp32_activations`).

    Raises:
        CorruptError: ONNX Runtime cannot load the graph.
        NblError: the provider has no kernel for an element type of the graph.
        MissingPackageError: onnxruntime is not installed.
    """
    ort = import_onnxruntime()
    _trim()
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    if threads:
        options.intra_op_num_threads = threads
    loaded = str(graph) if isinstance(graph, Path) else graph
    proto = read_proto(graph) if isinstance(graph, Path) else _parsed(graph)
    entries = dict(entries or {}) | ({_UNPACKED: "1"} if mapped and _is_float32(proto) else {})
    entries |= session_entries(proto)
    if fp32_activations:
        entries |= keep_fp32_activations(proto)
        loaded = proto.SerializeToString()
        folder = graph.parent if isinstance(graph, Path) else folder
    if folder is not None:
        entries[_DATA_FOLDER] = str(folder)
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    try:
        return ort.InferenceSession(loaded, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT's own exception types, one for each kind of damage
        name = graph if isinstance(graph, Path) else f"a graph of {folder or 'its own'}"
        if "NOT_IMPLEMENTED" in str(error):
            raise NblError(
                f"ONNX Runtime's CPU provider has no kernel for {name} (bf16?); its float32 copy runs: "
                f"{one_line(error)}"
            ) from error
        raise CorruptError(f"ONNX Runtime cannot load {name}: {one_line(error)}") from error


def _trim() -> None:
    """Let glibc return what was freed; it keeps blocks below 32 MiB, which most int4 matrices are (malloc_trim(3)).

    A closed session of the 8B shape leaves 0.6 GB of 8 GB, and the nine parts of a reference leave more.
    """
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _parsed(model: bytes) -> Any:
    import onnx

    return onnx.ModelProto.FromString(model)


def _is_float32(proto: Any) -> bool:
    """Whether all numbers in a graph are float32 or indices; external data is not read."""
    import onnx

    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    return kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL}


def contract_of_session(session: Any) -> GraphContract:
    """Names, element types and dimensions of a session's inputs and outputs, and the layers with a cache."""
    inputs = tuple(_info(value) for value in session.get_inputs())
    layers = sorted({int(m[1]) for value in inputs if (m := PAST.match(value.name))})
    return GraphContract(inputs, tuple(_info(value) for value in session.get_outputs()), tuple(layers))


def _info(value: Any) -> TensorInfo:
    shape = tuple(d if isinstance(d, int) else str(d) for d in value.shape)
    return TensorInfo(value.name, _DTYPES.get(value.type, value.type), shape)
