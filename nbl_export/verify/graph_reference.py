"""The reference of a model that exists only as a graph: the input graph, with the maps computed in numpy.

    b  the original graph against itself: cached steps and batches against one pass over each row
    c  the NBL graph against the original graph with maps computed in numpy: numpy reads the input of each map at a
       tap, and the output replaces the attention output. The graph passes of the rewrite are not used.
    d  greedy text through ONNX Runtime GenAI against the same reference, if there is a genai_config.json

Without the torch model, nothing proves that the input graph computes the model of its authors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.base import Mixer, apply
from nbl_export.records.decoder import DecoderSpec
from nbl_export.verify.ladder import Probe, Reference, greedy, shown_positions
from nbl_export.verify.structure import Setting

__all__ = ["MappedOriginal", "references"]


class MappedOriginal:
    """The original graph with numpy maps in place of attention; its interface is that of `OnnxDecoder`.

    Args:
        graph: with the logits of all tokens.
        maps: of the replaced layers; empty for the original.
        tap: the input of the maps.
    """

    def __init__(self, graph: Path, spec: DecoderSpec, maps: Mapping[int, Mixer], tap: str) -> None:
        from nbl_export.rewrite.taps import overriding_graph

        self._graph = overriding_graph(graph, tuple(maps), tap)
        self._maps, self._tap = maps, tap
        self._inner = OnnxDecoder(graph.parent, spec.head_dim, caches=self._graph.caches, proto=self._graph.proto)

    def begin(self, batch: int) -> None:
        """Empty caches and states for a batch."""
        self._states: dict[tuple[int, int], np.ndarray | None] = {}
        self._inner.begin(batch)

    def step(self, ids_BT: np.ndarray, valid_BT: np.ndarray | None = None) -> np.ndarray:
        """Append tokens and return their logits [B, T, V]. Layers run in order: each map needs the maps before it."""
        taps, names = self._graph.taps[self._tap], self._graph.given
        counts = np.full(len(ids_BT), ids_BT.shape[1]) if valid_BT is None else valid_BT.sum(1)
        width = next((mixer.size for mixer in self._maps.values()), 0)
        given = {name: np.zeros((*ids_BT.shape, width), np.float32) for name in names.values()}
        for layer in self._maps:
            (x_BTD,) = self._inner.look([taps[layer]], ids_BT, valid_BT, given)
            given[names[layer]] = self._mixed(layer, x_BTD, counts)
        return self._inner.step(ids_BT, valid_BT, given)

    def _mixed(self, layer: int, x_BTD: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
        """The output of a layer's mixer, which remembers each row's valid tokens alone."""
        mixer = self._maps[layer]
        if mixer.state is None:
            return apply(mixer, x_BTD)[0]
        found = np.zeros(x_BTD.shape, np.float32)
        for row, count in enumerate(counts_B):
            past = self._states.get((layer, row))
            found[row, :count], self._states[layer, row] = apply(mixer, x_BTD[row : row + 1, :count], past)
        return found


def references(
    graph: Path, setting: Setting, maps: Mapping[int, Mixer], probe: Probe, known: Reference | None = None
) -> dict[str, Reference]:
    """References of the input graph without maps and with maps.

    Args:
        known: the reference without maps, if it is known; it is then not computed.
    """
    found = {} if known is None else {"original": known}
    for subject, ours in (("original", {}), ("nbl", maps)):
        if subject in found:
            continue
        mapped = MappedOriginal(graph, setting.spec, ours, setting.plan.tap)
        with setting.task(f"reference of {subject}"):
            found[subject] = _reference(mapped, probe)
    return found


def _reference(decoder: MappedOriginal, probe: Probe) -> Reference:
    logits = tuple(_one_pass(decoder, row) for row in probe.rows)
    texts = [greedy(decoder, prompt, probe.new_tokens) for prompt in probe.prompts]
    long = _one_pass(decoder, probe.long)[shown_positions(len(probe.long))] if probe.long else None
    return Reference(
        logits,
        tuple(np.zeros(len(row), np.float32) for row in probe.rows),
        tuple(ids for ids, _ in texts),
        tuple(gaps for _, gaps in texts),
        long,
        None if long is None else np.zeros(len(long), np.float32),
    )


def _one_pass(decoder: Any, row: Sequence[int]) -> np.ndarray:
    decoder.begin(1)
    logits: np.ndarray = decoder.step(np.asarray([row]))[0]
    return logits
