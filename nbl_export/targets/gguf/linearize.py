"""A Llama's GGUF content with maps in place of attention: architecture `deci`.

llama.attention.head_count      9         deci.attention.head_count      [9, 9, 9, ...]
llama.attention.head_count_kv   3         deci.attention.head_count_kv   [3, 0, 3, ...]   0: no attention
blk.1.attn_{q,k,v}.weight                 left out
blk.1.attn_output.weight                  W [D, D], applied to the normed input
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.graph.gguf.content import Content, Key, Tensor, recoded, tensor_of
from nbl_export.mixers.base import Mixer

__all__ = ["ARCHITECTURE", "KEEP", "TYPES", "check_base", "exchanged", "linearized", "with_neighbours"]

ARCHITECTURE = "deci"
KEEP = "keep"  # every tensor keeps its codes
# Type of all matrices, as `--type` names it -> llama.cpp's name of the file type.
TYPES = {KEEP: "", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_ATTENTION = re.compile(r"blk\.(\d+)\.attn_(?:q|k|v|output)\.(?:weight|bias)")
_MATRIX = re.compile(r"(?:blk\.\d+\..*|token_embd|output)\.weight")
# Tensors that a Llama has and `deci` computes; a base with others is of another kind.
_KNOWN = re.compile(
    r"token_embd\.weight|output\.weight|output_norm\.weight|rope_freqs\.weight"
    r"|blk\.\d+\.(?:attn_norm|attn_q|attn_k|attn_v|attn_output|ffn_norm|ffn_gate|ffn_up|ffn_down)\.weight"
    r"|blk\.\d+\.attn_(?:q|k|v)\.bias"
)
# Architectures whose rotary embedding pairs the halves of a head. `deci` pairs neighbours, so rows are exchanged.
_HALVES = ("qwen2",)
_BASES = ("llama", *_HALVES)


def check_base(content: Content, where: object) -> None:
    """Refuse a model that `deci` does not compute.

    Raises:
        NblError: another architecture, tensors that `deci` has no place for, or a window.
    """
    if content.architecture not in _BASES:
        raise NblError(
            f"{where} has architecture {content.architecture!r}; llama.cpp runs linear layers only in the form of "
            f"{' and '.join(_BASES)} (its architecture deci)"
        )
    foreign = next((t.name for t in content.tensors if not _KNOWN.fullmatch(t.name)), None)
    if foreign is not None:
        raise NblError(f"{where} has {foreign}, which llama.cpp's architecture deci has no place for")
    if content.get("attention.sliding_window"):
        raise NblError(f"{where} has a sliding window, which llama.cpp's architecture deci does not compute")


def linearized(content: Content, maps: Mapping[int, Mixer], kind: str, about: Mapping[str, Key]) -> Content:
    """The content with the layers of `maps` replaced.

    Args:
        kind: one of `TYPES`. KEEP copies codes, and gives a map the type of the matrix in its place, or Q8_0 if the
            gguf package has no quantiser of that type.
        about: keys to add.

    Raises:
        NblError: a map has a bias, or another width than the model.
    """
    size = int(content.get("embedding_length"))
    matrices = {layer: mixer.product() for layer, mixer in maps.items()}
    for layer, matrix in matrices.items():
        if matrix is None or matrix.shape != (size, size):
            raise NblError(f"layer {layer}'s map has a bias, or is not {size} wide; GGUF stores a matrix of that width")
    tensors = [t for t in content.tensors if not _is_replaced(t.name, maps)]
    tensors = [with_neighbours(t, content) for t in tensors]
    places = content.by_name
    tensors += [_map_tensor(layer, matrix, places, kind) for layer, matrix in sorted(matrices.items())]
    if kind != KEEP:
        tensors = [recoded(t, _matrix_type(t.shape, kind)) if _MATRIX.fullmatch(t.name) and len(t.shape) == 2 else t
                   for t in tensors]  # fmt: skip
    return Content(ARCHITECTURE, {**_keys(content, maps, kind), **about}, tuple(tensors))


def _is_replaced(name: str, maps: Mapping[int, Mixer]) -> bool:
    found = _ATTENTION.fullmatch(name)
    return found is not None and int(found[1]) in maps


def _map_tensor(layer: int, matrix: Any, places: Mapping[str, Tensor], kind: str) -> Tensor:
    name = f"blk.{layer}.attn_output.weight"
    chosen = _matrix_type(matrix.shape, kind) if kind != KEEP else _neighbour_type(places[name])
    return tensor_of(name, matrix, chosen)


def _matrix_type(shape: tuple[int, ...], kind: str) -> Any:
    """The type of a matrix in a file of this kind: F16 if its rows are no whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[kind.upper()]
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _neighbour_type(tensor: Tensor) -> Any:
    """The tensor's own type, or Q8_0 if the gguf package cannot write it (K-quants and IQ types)."""
    from gguf import GGMLQuantizationType, quants

    try:
        quants.quantize(np.zeros((1, 256), np.float32), tensor.kind)
    except NotImplementedError:
        return _matrix_type(tensor.shape, GGMLQuantizationType.Q8_0.name)
    return tensor.kind


def with_neighbours(tensor: Tensor, content: Content) -> Tensor:
    """A tensor of queries or keys with rotary pairs as neighbours; codes stay as they are. Other tensors are the same.

    A Llama's file pairs neighbours already.
    """
    if content.architecture not in _HALVES:
        return tensor
    found = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", tensor.name)
    if found is None:
        return tensor
    heads = int(content.get("attention.head_count" if found[1] == "q" else "attention.head_count_kv"))

    def read() -> np.ndarray:
        stored = tensor.read()
        return exchanged(stored, heads)

    return Tensor(tensor.name, tensor.shape, tensor.kind, read)


def exchanged(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of all heads [H * d, ...], from the order of halves to the order of neighbours."""
    by_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(by_head.swapaxes(1, 2)).reshape(rows.shape)


def _keys(content: Content, maps: Mapping[int, Mixer], kind: str) -> dict[str, Key]:
    from gguf import LlamaFileType

    before = f"{content.architecture}."
    keys = {(f"{ARCHITECTURE}.{name.removeprefix(before)}" if name.startswith(before) else name): key
            for name, key in content.keys.items()}  # fmt: skip
    layers, heads = range(content.num_layers), int(content.get("attention.head_count"))
    pairs = int(content.get("attention.head_count_kv", heads))
    keys[f"{ARCHITECTURE}.attention.head_count"] = Key.numbers([heads for _ in layers])
    keys[f"{ARCHITECTURE}.attention.head_count_kv"] = Key.numbers([0 if i in maps else pairs for i in layers])
    if f"{ARCHITECTURE}.rope.dimension_count" not in keys:
        length = int(content.get("attention.key_length", int(content.get("embedding_length")) // heads))
        keys[f"{ARCHITECTURE}.rope.dimension_count"] = Key.number(length)
    if kind != KEEP:
        keys["general.file_type"] = Key.number(int(LlamaFileType[TYPES[kind]]))
    return keys
