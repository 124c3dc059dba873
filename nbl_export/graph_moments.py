"""Moments of a decoder graph: taps of every layer, run in ONNX Runtime -> the sums that `calibrate` makes of torch.

The rows are those that hooks on the torch model would see, so the maps are the same but for rounding. The head is not
computed. One window at a time is run, so that no more activations are held than those of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nbl_export.calibrate import Rows
from nbl_export.engines.onnx_decoder import OnnxDecoder
from nbl_export.records import DecoderSpec

__all__ = ["GraphCollection"]


class GraphCollection(Rows):
    """What `calibrate.Collection` is to a torch model.

    Args:
        graph: its file; every layer must be recognised.
        spec: its numbers.
        taps: of `records.TAPS`.

    Raises:
        RefusalError: a layer is not understood, or has no such tap.
    """

    def __init__(self, graph: Path, spec: DecoderSpec, taps: Sequence[str], threads: int | None = None) -> None:
        from nbl_export.rewrite.taps import collecting_graph

        super().__init__(taps, spec.num_layers, spec.hidden_size)
        self._graph = collecting_graph(graph, self.taps)
        self._decoder = OnnxDecoder(
            self._graph.directory, spec.head_dim, threads, caches=self._graph.caches, proto=self._graph.proto
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
        rows = {name: torch.from_numpy(value[0]).float() for name, value in seen.items()}
        for tap, pairs in wanted.items():
            for accumulator, (x, y) in zip(self.found[tap], pairs, strict=True):
                accumulator.update(rows[x], rows[y])
