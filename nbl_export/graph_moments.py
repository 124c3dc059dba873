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

from nbl_export.calibrate import refuse_not_finite
from nbl_export.engines.onnx_decoder import OnnxDecoder
from nbl_export.records import DecoderSpec
from nbl_export.sums import REFERENCE_ROWS, Accumulator, Sums

__all__ = ["GraphCollection"]


class GraphCollection:
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

        self.taps, self.size, self.num_layers = tuple(taps), spec.hidden_size, spec.num_layers
        self.found = {tap: [Accumulator(self.size) for _ in range(self.num_layers)] for tap in self.taps}
        self._graph = collecting_graph(graph, self.taps)
        self._decoder = OnnxDecoder(
            self._graph.directory, spec.head_dim, threads, caches=self._graph.caches, proto=self._graph.proto
        )

    def __enter__(self) -> GraphCollection:
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        del self._decoder

    def refer(self, ids_WT: torch.Tensor) -> None:
        """Take reference rows and units from the beginning of the whole text."""
        self.add(ids_WT[:1, :REFERENCE_ROWS])
        for accumulator in self.accumulators():
            accumulator.clear()

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

    def accumulators(self) -> list[Accumulator]:
        """All of them, in an order that is the same everywhere."""
        return [accumulator for accumulators in self.found.values() for accumulator in accumulators]

    @property
    def count(self) -> int:
        """Rows so far."""
        return self.found[self.taps[0]][0].count

    def layer(self, index: int) -> dict[str, Sums]:
        """The sums of a layer, by tap.

        Raises:
            NblError: its activations are not finite.
        """
        found = {tap: accumulators[index].sums() for tap, accumulators in self.found.items()}
        for sums in found.values():
            refuse_not_finite(sums, index)
        return found

    def restore(self, index: int, sums: dict[str, Sums]) -> None:
        """Go on from what `layer` gave."""
        for tap, found in sums.items():
            self.found[tap][index].restore(found)
