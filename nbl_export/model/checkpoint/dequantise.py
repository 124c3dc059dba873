"""The checkpoint of a GGUF file: what transformers writes, with one tensor in memory at a time.

    a tensor of the file ─► floats (gguf) ─► changed and named (transformers) ─► its place in model.safetensors

All sizes are known before the first tensor, so the header is written first. transformers itself would load the whole
model. An architecture that transformers does not read tensor by tensor is loaded whole (`pretrained.gguf_outline`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.files import safetensors_header
from nbl_export.model.checkpoint import pretrained
from nbl_export.model.checkpoint.pretrained import GgufOutline, gguf_outline, model_of, refuse_missing, tokenizer_of

__all__ = ["dequantise"]

_WEIGHTS = "model.safetensors"
_SHARD = "50GB"  # of a file at most, the default of `save_pretrained`
_VALUES = 1 << 22  # that gguf dequantises at once, since it holds them twice


def dequantise(gguf: Path, out: Path) -> None:
    """Write configuration, weights in float32 and tokenizer of a GGUF file to a new directory.

    Raises:
        NblError: a tensor is missing or has another shape; or the model is loaded whole, and cannot be in memory.
    """
    outline = gguf_outline(gguf)
    if outline is None:
        _whole(gguf, out)
    else:
        outline.model.save_pretrained(out, state_dict={})  # the configurations alone
        _write_weights(outline, out)
    tokenizer_of(gguf).save_pretrained(out)


def _whole(gguf: Path, out: Path) -> None:
    """Write configuration and weights by transformers."""
    from nbl_export.model.one_layer import refuse_whole

    refuse_whole(gguf, "the conversion of a GGUF file of this architecture")
    model = model_of(gguf)
    # transformers refuses to save a model that was loaded quantised; these weights are dequantised.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(out, max_shard_size=_SHARD)


def _write_weights(outline: GgufOutline, out: Path) -> None:
    parameters = dict(outline.model.named_parameters())  # a tied one once
    missing = set(parameters)
    with contextlib.ExitStack() as stack:
        places = {}
        for file, names in _shards(parameters, out).items():
            stream = stack.enter_context((out / file).open("wb"))
            tensors = {name: ("F32", parameters[name].shape) for name in sorted(names)}
            header, begins = safetensors_header(tensors, {"format": "pt"})
            stream.write(header)
            places.update({name: (stream, begin) for name, begin in begins.items()})
        for tensor in pretrained.reader(outline.file).tensors:
            name = outline.names.get(tensor.name)
            if name in places:
                stream, begin = places[name]
                stream.seek(begin)
                stream.write(_stored(tensor, outline, tuple(parameters[name].shape)))
                missing.discard(name)
    refuse_missing(outline.file, missing)


def _shards(parameters: Mapping[str, Any], out: Path) -> dict[str, list[str]]:
    """Parameters of each file; writes the index if there are several files."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(parameters), filename_pattern="model{suffix}.safetensors", max_shard_size=_SHARD
    )
    if split.is_sharded:
        total = sum(parameter.numel() for parameter in parameters.values())
        index = {"metadata": {"total_parameters": total, **split.metadata}, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (out / f"{_WEIGHTS}.index.json").write_text(f"{text}\n", encoding="utf-8")
    return dict(split.filename_to_tensors)


def _stored(tensor: Any, outline: GgufOutline, shape: tuple[int, ...]) -> memoryview:
    """Bytes of a parameter."""
    values = np.ascontiguousarray(outline.change(tensor.name, _floats(tensor)), "<f4")
    if values.shape != shape:
        found = f"{outline.file} has {tensor.name} in shape {list(values.shape)}"
        raise NblError(f"{found}, and its keys state {list(shape)}; fetch the model again")
    return values.reshape(-1).view(np.uint8).data


def _floats(tensor: Any) -> np.ndarray:
    """Values of a tensor of the file in float32, dequantised some rows at a time."""
    from gguf import dequantize

    if len(tensor.shape) < 2:
        vector: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
        return vector
    shape = [int(n) for n in reversed(tensor.shape)]
    values, rows = np.empty(shape, np.float32), max(1, _VALUES // math.prod(shape[1:]))
    for begin in range(0, len(values), rows):
        part = slice(begin, begin + rows)
        values[part] = dequantize(tensor.data[part], tensor.tensor_type)
    return values
