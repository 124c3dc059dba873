"""Moments of a decoder graph, collected from the taps of every layer in ONNX Runtime.

The rows equal the rows that hooks on the torch model see, so the maps differ only by rounding. The head is not
computed. Windows run one at a time, so only the activations of one window are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nbl_export.calibrate.hooks import Rows
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers import DEFAULT
from nbl_export.mixers.base import Kind
from nbl_export.records.decoder import DecoderSpec

__all__ = ["GraphCollection"]


class GraphCollection(Rows):
    """Accumulators that a decoder graph fills, as a torch model fills `hooks.Collection`.

    Args:
        graph: the ONNX file; every layer must be recognised.
        spec: the decoder's sizes.
        taps: some of `records.plan.TAPS`.
        kind: of the mixers that the sums are for.

    Raises:
        RefusalError: a layer is not recognised, or has no such tap.
    """

    def __init__(self, graph: Path, spec: DecoderSpec, taps: Sequence[str], kind: Kind = DEFAULT) -> None:
        from nbl_export.rewrite.taps import collecting_graph

        super().__init__(taps, spec.num_layers, spec.hidden_size, kind)
        self._graph = collecting_graph(graph, self.taps)
        self._decoder = OnnxDecoder(
            self._graph.directory, spec.head_dim, caches=self._graph.caches, proto=self._graph.proto
        )

    def __enter__(self) -> GraphCollection:
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        del self._decoder

    def add(self, batch_BT: torch.Tensor) -> None:
        """Run the windows of a batch and add their rows."""
        for window in batch_BT:
            self._add(window[None].numpy())

    def _add(self, ids: Any) -> None:
        wanted = {
            tap: [(names[i], self._graph.attention[i]) for i in range(self.num_layers)]
            for tap, names in self._graph.taps.items()
        }
        names = sorted({name for pairs in wanted.values() for pair in pairs for name in pair})
        self._decoder.begin(1)
        seen = dict(zip(names, self._decoder.look(names, ids), strict=True))
        rows = {name: torch.from_numpy(value).float() for name, value in seen.items()}
        for tap, pairs in wanted.items():
            for accumulator, (x, y) in zip(self.found[tap], pairs, strict=True):
                accumulator.update(self.kind.features(rows[x]).flatten(0, 1), rows[y].flatten(0, 1))
