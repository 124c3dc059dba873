"""A decoder whose prompts stop at an exit layer (`methods.predicted_kv.maps`): the original graph, and edits of its
caches.

    first token ----- graph --- stream at the exit layer --+                          its caches stay
    skipped tokens -- graph --- stream at the exit layer --+- maps -- rotary ---+---- caches of the layers with maps
    last W tokens --- graph --- logits                                          +---- they attend to all of these

A step of at most W + 1 tokens is one run of the graph. Sequences of a batch run one by one, so none is padded. No pass
of the rewrite is used, and norms of keys and rotary embedding are NumPy's. In the static form
(`methods.predicted_kv.static`), each sequence of a batch stops by its own length; else the shortest one decides for
all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import get_const_tensor

from nbl_export.errors import RefusalError
from nbl_export.graph.anatomy import find_attention, find_block, find_written, key_steps
from nbl_export.graph.caches import is_static
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.files import load_graph
from nbl_export.graph.names import all_logits_file
from nbl_export.methods.mixed_session import MixedSession
from nbl_export.methods.predicted_kv.maps import PredictedKV, exit_of

__all__ = ["KeysValues", "PredictedKVDecoder", "Rotary", "onnx_reference"]

_TABLES = slice(7, 9)  # inputs of GroupQueryAttention: cosines and sines
_EPSILON = 1e-5  # of ONNX's norms that state none


KeysValues = tuple[np.ndarray, np.ndarray]
Fill = Callable[[Any, Mapping[int, KeysValues], int], None]


class PredictedKVDecoder:
    """The original graph with predicted KV; steps as an `OnnxDecoder`'s.

    Args:
        decoder: runs the original graph, one sequence at a time: `begin`, `run` (all outputs by name), `step`, `mark`,
            `rewind` and `length` as of an `OnnxDecoder`.
        stream: name of the output that is the stream at the exit layer.
        fill: puts keys and values [1, T, K] of each layer, for all tokens but the first, into the end of the caches.
            It gets the decoder, them by layer, and the position of the first token.
        apart: whether each sequence of a batch stops by its own length; else the shortest one decides for all.
    """

    def __init__(
        self, decoder: Any, stream: str, maps: Mapping[int, PredictedKV], fill: Fill, *, apart: bool = True
    ) -> None:
        self._recent_tokens = exit_of(maps).recent_tokens
        self._maps = maps
        self._stream = stream
        self._fill = fill
        self._apart = apart
        self._decoder = decoder
        self._sequences: list[Any] = []

    def begin(self, batch: int) -> None:
        """Start a batch with empty caches."""
        self._decoder.begin(1)
        self._sequences = [self._decoder.mark()] * batch

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens; returns float32 logits [B, T, V], NaN for tokens that do not continue and for padding.

        Args:
            valid_BT: 1 for tokens, 0 for padding on the right.
        """
        valid_BT = np.ones_like(ids_BT) if valid_BT is None else valid_BT
        shortest = int(valid_BT.sum(1).min())
        found = np.full((0,), np.nan, np.float32)
        for row, length in enumerate(valid_BT.sum(1)):
            self._decoder.rewind(self._sequences[row])
            ids_1T = ids_BT[row : row + 1, :length]
            stops = (length if self._apart else shortest) > self._recent_tokens + 1
            logits_TV = self._stopping(ids_1T) if stops else self._decoder.step(ids_1T)[0]
            if not row:
                found = np.full((*ids_BT.shape, logits_TV.shape[1]), np.nan, np.float32)
            found[row, :length] = logits_TV
            self._sequences[row] = self._decoder.mark()
        return found

    def _stopping(self, ids_1T: np.ndarray) -> np.ndarray:
        """Logits [T, V] of a step of more than W + 1 tokens."""
        recent_tokens = self._recent_tokens
        place = self._decoder.length
        first, skipped = (self._decoder.run(part) for part in (ids_1T[:, :1], ids_1T[:, 1:-recent_tokens]))
        self._predict(np.concatenate([first[self._stream], skipped[self._stream]], 1), place)
        last = self._decoder.step(ids_1T[:, -recent_tokens:])[0]
        logits_TV = np.full((ids_1T.shape[1], last.shape[1]), np.nan, np.float32)
        logits_TV[0] = first["logits"][0, 0]
        logits_TV[-recent_tokens:] = last
        return logits_TV

    def _predict(self, x_1TD: np.ndarray, place: int) -> None:
        """Put predicted keys and values of all tokens but the first into the caches.

        Args:
            x_1TD: the stream of the first token and of the skipped ones.
            place: position of the first.
        """
        self._fill(self._decoder, {layer: mixer(x_1TD) for layer, mixer in self._maps.items()}, place)


def onnx_reference(
    directory: Path, head_dim: int, maps: Mapping[int, PredictedKV], *, fp32_activations: bool = False
) -> PredictedKVDecoder:
    """The decoder of an ONNX graph, as `Method.reference` has it."""
    exit_layer = exit_of(maps).exit_layer
    file = directory / all_logits_file(directory)
    graph = load_graph(file).graph
    layers = {layer: _Layer.of(graph, layer) for layer in maps}
    session = MixedSession(file, {}, "residual", fp32_activations=fp32_activations, shown=(exit_layer,))
    decoder = OnnxDecoder(directory, head_dim, session=session)

    def fill(decoder: Any, given: Mapping[int, KeysValues], place: int) -> None:
        for layer, rows in given.items():
            layers[layer].fill(decoder, rows, place)

    return PredictedKVDecoder(decoder, session.streams[exit_layer], maps, fill, apart=is_static(graph))


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding of a GroupQueryAttention.

    Attributes:
        cosines, sines: [positions, R / 2], of the first R numbers of a head; the others are not rotated.
        interleaved: whether pairs are neighbours, or half of R apart.
    """

    cosines: np.ndarray
    sines: np.ndarray
    interleaved: bool = False

    def __call__(self, x_BHTD: np.ndarray, place: int) -> np.ndarray:
        """Rotate tokens of which the first is at position `place`."""
        here = slice(place, place + x_BHTD.shape[2])
        cos_TR = self.cosines[here].astype(np.float32)
        sin_TR = self.sines[here].astype(np.float32)
        half = cos_TR.shape[1]
        firsts, seconds = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
            if self.interleaved
            else (slice(0, half), slice(half, 2 * half))
        )
        found = x_BHTD.copy()
        a = x_BHTD[..., firsts]
        b = x_BHTD[..., seconds]
        found[..., firsts] = a * cos_TR - b * sin_TR
        found[..., seconds] = b * cos_TR + a * sin_TR
        return found


@dataclass(frozen=True)
class _Layer:
    """Names of a layer's caches of keys and of values, its key heads, norms of keys, and its rotary embedding."""

    caches: tuple[str, str]
    heads: int
    steps: tuple[ir.Node, ...]
    rotary: Rotary | None

    @classmethod
    def of(cls, graph: ir.Graph, layer: int) -> _Layer:
        """Raises RefusalError: its keys are not rotated from constant tables, or come otherwise than by a product."""
        block = find_block(graph, layer)
        steps: tuple[ir.Node, ...] = ()
        rotates = True
        if is_static(graph):
            attention = find_written(block).rotary
            gathers = [None if value is None else value.producer() for value in attention.inputs[1:3]]
            tables = [None if node is None else node.inputs[0] for node in gathers]
            name = ""
        else:
            attention = find_attention(block)
            name = "rotary_"
            tables = list(attention.inputs[_TABLES])
            steps = () if attention.inputs[1] is None else key_steps(layer, attention)
            rotates = attention.attributes.get_int("do_rotary", 0) == 1
        keys, held = (str(past.name) for past in block.pasts)
        heads = attention.attributes["num_heads" if is_static(graph) else "kv_num_heads"].as_int()
        if not rotates:
            return cls((keys, held), heads, steps, None)
        values = [None if table is None else table.const_value for table in tables]
        if any(value is None for value in values):
            raise RefusalError(layer, "the tables of its rotary embedding are no constants")
        cosines, sines = (value.numpy() for value in values if value is not None)
        interleaved = bool(attention.attributes.get_int(f"{name}interleaved", 0))
        return cls((keys, held), heads, steps, Rotary(cosines, sines, interleaved))

    def fill(self, decoder: OnnxDecoder, given: tuple[np.ndarray, np.ndarray], place: int) -> None:
        """Put keys and values [1, T, K] of all tokens but the first at `place` into the end of the caches."""
        keys, values = (rows[:, 1:] for rows in given)
        for step in self.steps:
            keys = _stepped(step, keys)
        keys = self._heads(keys)
        keys = keys if self.rotary is None else self.rotary(keys, place + 1)
        for cache, rows in zip(self.caches, (keys, self._heads(values)), strict=True):
            decoder.overwrite(cache, rows)

    def _heads(self, x_1TK: np.ndarray) -> np.ndarray:
        return x_1TK.reshape(*x_1TK.shape[:2], self.heads, -1).swapaxes(1, 2)


def _constant(value: ir.Value | None) -> np.ndarray:
    """A constant, or a sum of constants, as a norm's weight plus one is.

    Raises:
        RefusalError: the value is neither.
    """
    node = None if value is None else value.producer()
    tensor = None if value is None else get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    if node is None or node.op_type != "Add":
        raise RefusalError(None, "a norm between keys and their attention reads no constants")
    first, second = (_constant(part) for part in node.inputs)
    total: np.ndarray = first + second
    return total


def _stepped(node: ir.Node, x: np.ndarray) -> np.ndarray:
    """What a node between a product and its attention computes: another shape, or an RMS norm over the last axis.

    Types of numbers count for nothing: the reference computes in float32.
    """
    if node.op_type == "Cast":
        return x
    given = _constant(node.inputs[1])
    if node.op_type == "Reshape":
        return x.reshape([x.shape[n] if size == 0 else size for n, size in enumerate(given.tolist())])
    size = np.sqrt(np.square(x).mean(-1, keepdims=True) + node.attributes.get_float("epsilon", _EPSILON))
    normed: np.ndarray = x / size * given.astype(np.float32)
    return normed
