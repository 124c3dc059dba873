"""Copies a model folder into the layout of transformers.js.

    model/model.onnx, model.onnx.data            OUT/onnx/model.onnx, model.onnx_data    transformers.js
    model/config.json, tokenizer ...        ->   OUT/config.json, tokenizer ...          (model_q4.onnx at int4, ...)

transformers.js (4.3) reads the graph from onnx/; the file name states the precision. If config.json announces a data
file, it fetches the graph's name with "_data". It reads the chat template from tokenizer_config.json only. It makes
empty caches from the shapes of the graph's inputs and counts a symbolic dimension as 0, so the head size must be a
number. It accepts cache ids with gaps if config.json has the full number of layers. A browser holds about 2 GB in one
file; a larger model needs Node.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import friendly_os_errors, move_into_place, refuse_occupied, write_json
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE, MANIFEST
from nbl_export.graph.trust import read_proto
from nbl_export.trust.contained import check_folder
from nbl_export.trust.model_settings import drop_code, read_object, read_text

__all__ = ["lay_out"]

_SETTINGS = ("config.json", GENAI_CONFIG, "tokenizer_config.json")
_MOST_BYTES = 64 << 20
_COPIED = ("generation_config.json", MANIFEST, "tokenizer.json", "chat_template.jinja", "special_tokens_map.json",
           "README.md")  # fmt: skip
# Bits of quantised products, or 16 and 32 -> the dtype of transformers.js, and the suffix of the file name
_DTYPES = {32: ("fp32", ""), 16: ("fp16", "_fp16"), 8: ("q8", "_quantized"), 4: ("q4", "_q4")}
_FLOAT16 = 10  # of TensorProto


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
    source = directory if (directory / GRAPH_FILE).is_file() else directory / "model"
    for name in (GRAPH_FILE, "tokenizer.json", *_SETTINGS):
        if not (source / name).is_file():
            raise NblError(
                f"{directory} has no complete model folder: {source / name} is missing; "
                "give the model/ of a finished run for ONNX Runtime"
            )
    check_folder(source)
    config, genai, tokenizer = (read_object(source / name, _MOST_BYTES) for name in _SETTINGS)
    proto, data = read_proto(source / GRAPH_FILE), source / f"{GRAPH_FILE}.data"
    values = (*proto.graph.input, *proto.graph.output)
    caches = [value for value in values if value.name.startswith(("past_key_values.", "present."))]
    dtype, suffix = _DTYPES[_bits(proto, caches)]
    graph = f"model{suffix}.onnx"
    _set_head_size(caches, genai, source)
    _rename_data(proto, f"{graph}_data", source)
    with friendly_os_errors(target), tempfile.TemporaryDirectory(prefix="nbl-export-layout-") as scratch:
        out = Path(scratch) / "layout"
        (out / "onnx").mkdir(parents=True)
        (out / "onnx" / graph).write_bytes(proto.SerializeToString())
        copies = {source / name: out / name for name in _COPIED} | {data: out / "onnx" / f"{graph}_data"}
        for file, copy in copies.items():
            if file.is_file():
                shutil.copyfile(file, copy)
        ours = {"dtype": dtype, "use_external_data_format": int(data.is_file())}
        write_json(out / "config.json", {**config, "transformers.js_config": ours})
        if (template := source / "chat_template.jinja").is_file():
            tokenizer.setdefault("chat_template", read_text(template))
        write_json(out / "tokenizer_config.json", tokenizer)
        drop_code(out)
        return move_into_place(out, target)


def _bits(proto: Any, caches: list[Any]) -> int:
    """Bits of the quantised products, or of an element of the caches."""
    products = [node for node in proto.graph.node if node.op_type == "MatMulNBits"]
    if products:
        return min(a.i for node in products for a in node.attribute if a.name == "bits")
    return 16 if any(value.type.tensor_type.elem_type == _FLOAT16 for value in caches) else 32


def _set_head_size(caches: list[Any], genai: dict[str, Any], source: Path) -> None:
    try:
        head_size = int(genai["model"]["decoder"]["head_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(f"{source / GENAI_CONFIG} has no model.decoder.head_size; export again") from error
    for value in caches:
        dims = value.type.tensor_type.shape.dim
        if len(dims) != 4:
            raise NblError(
                f"{source / GRAPH_FILE}: the cache {value.name} does not have 4 dimensions; it is not a GenAI cache"
            )
        dims[3].dim_value = head_size


def _rename_data(proto: Any, name: str, source: Path) -> None:
    for entry in (e for tensor in proto.graph.initializer for e in tensor.external_data if e.key == "location"):
        if entry.value != f"{GRAPH_FILE}.data":
            raise NblError(
                f"{source / GRAPH_FILE} keeps weights in {entry.value!r}, not in {GRAPH_FILE}.data; export again"
            )
        entry.value = name
