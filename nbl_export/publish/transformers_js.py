"""Copies a model folder into the layout of transformers.js.

    model/model.onnx, model.onnx.data            OUT/onnx/model.onnx, model.onnx_data    transformers.js
    model/config.json, tokenizer ...        ->   OUT/config.json, tokenizer ...          (model_q4.onnx at int4, ...)

transformers.js (4.3) reads the graph from onnx/; the file name states the precision. If config.json announces a data
file, it fetches the graph's name with "_data". It reads the chat template from tokenizer_config.json only. It makes
empty caches from the shapes of the graph's inputs and counts a symbolic dimension as 0, so the head size must be a
number. It accepts cache ids with gaps if config.json has the full number of layers. A browser holds about 2 GB in one
file; a larger model needs Node.

ONNX Runtime, GenAI, optimum-onnx and onnxruntime-node read a model folder unchanged.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, MissingPackageError, NblError
from nbl_export.files import friendly_os_errors, move_into_place, refuse_occupied, write_json
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE, MANIFEST
from nbl_export.trust.contained import check_folder

__all__ = ["lay_out"]

_GRAPH = GRAPH_FILE
_COPIED = ("generation_config.json", MANIFEST, "tokenizer.json", "chat_template.jinja", "special_tokens_map.json",
           "README.md")  # fmt: skip
# precision -> the dtype of transformers.js, and the suffix of the file name; int8 is eight-bit blocks
_DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}


def lay_out(directory: Path, target: Path) -> Path:
    """Copy the model folder of a run, or a single model folder, to `target` in the layout of transformers.js.

    Args:
        directory: only read.
        target: new or empty; after an error it is unchanged.

    Raises:
        NblError: the folder has no model.onnx with its settings, or `target` is occupied.
        CorruptError: a file of the folder cannot be read, or is a link that leaves the folder.
    """
    refuse_occupied(target)
    source = _model_folder(directory)
    check_folder(source)
    settings = {name: _read(source / name) for name in ("config.json", GENAI_CONFIG, "tokenizer_config.json")}
    graph = _read_graph(source / _GRAPH)
    with friendly_os_errors(target), tempfile.TemporaryDirectory(prefix="nbl-export-layout-") as scratch:
        made = Path(scratch) / "layout"
        (made / "onnx").mkdir(parents=True)
        _write_graph(graph, source, made / "onnx", _head_size(settings[GENAI_CONFIG], source))
        _write_settings(settings, graph, source, made)
        return move_into_place(made, target)


def _model_folder(directory: Path) -> Path:
    source = directory if (directory / _GRAPH).is_file() else directory / "model"
    for name in (_GRAPH, "config.json", GENAI_CONFIG, "tokenizer.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            raise NblError(
                f"{directory} has no complete model folder: {source / name} is missing; "
                "give the model/ of a finished run for ONNX Runtime"
            )
    return source


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); export the model again") from error
    if not isinstance(value, dict):
        raise CorruptError(f"{path} is not an object of settings; export the model again")
    return value


def _head_size(genai: dict[str, Any], source: Path) -> int:
    try:
        return int(genai["model"]["decoder"]["head_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{source / GENAI_CONFIG} has no model.decoder.head_size; export again") from error


def _read_graph(path: Path) -> Any:
    """The graph without its external data."""
    try:
        import onnx
    except ImportError as error:
        raise MissingPackageError("onnx", "cpu", "laying a model out") from error
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own exception types
        raise CorruptError(f"{path} is not an ONNX graph ({error}); export the model again") from error


def _precision(graph: Any) -> str:
    """The precision of a graph: the bits of its quantised products, or the type of its caches."""
    bits = {
        a.i for node in graph.graph.node if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"
    }
    if bits:
        return "int4" if 4 in bits else "int8"
    half = 10  # TensorProto.FLOAT16
    return "fp16" if any(i.type.tensor_type.elem_type == half for i in _cache_tensors(graph)) else "fp32"


def _cache_tensors(graph: Any) -> list[Any]:
    values = [*graph.graph.input, *graph.graph.output]
    return [v for v in values if v.name.startswith(("past_key_values.", "present."))]


def _write_graph(graph: Any, source: Path, out: Path, head_size: int) -> None:
    """Write the graph under its new name with its data file, and with head sizes as numbers."""
    name = f"model{_DTYPES[_precision(graph)][1]}.onnx"
    for value in _cache_tensors(graph):
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 4:
            raise NblError(
                f"{source / _GRAPH}: the cache {value.name} does not have 4 dimensions; it is not a GenAI cache"
            )
        dims[3].dim_value = head_size
    for entry in (e for tensor in graph.graph.initializer for e in tensor.external_data if e.key == "location"):
        if entry.value != f"{_GRAPH}.data":
            raise NblError(f"{source / _GRAPH} keeps weights in {entry.value!r}, not in {_GRAPH}.data; export again")
        entry.value = f"{name}_data"
    (out / name).write_bytes(graph.SerializeToString())
    if _has_data(source):
        shutil.copyfile(source / f"{_GRAPH}.data", out / f"{name}_data")


def _has_data(source: Path) -> bool:
    return (source / f"{_GRAPH}.data").is_file()


def _write_settings(settings: dict[str, dict[str, Any]], graph: Any, source: Path, out: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    dtype = _DTYPES[_precision(graph)][0]
    ours = {"dtype": dtype, "use_external_data_format": int(_has_data(source))}
    write_json(out / "config.json", {**settings["config.json"], "transformers.js_config": ours})
    tokenizer = dict(settings["tokenizer_config.json"])
    template = source / "chat_template.jinja"
    if template.is_file():
        tokenizer.setdefault("chat_template", template.read_text(encoding="utf-8"))
    write_json(out / "tokenizer_config.json", tokenizer)
