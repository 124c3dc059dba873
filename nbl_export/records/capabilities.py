"""What differs between engines, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbl_export.records.plan import USUAL_KIND

__all__ = ["LINEAR_KINDS", "Capabilities"]

LINEAR_KINDS = frozenset({USUAL_KIND})  # that every engine has: products in place of attention


@dataclass(frozen=True)
class Capabilities:
    """What differs between engines; no other code asks for an engine's name.

    Attributes:
        precisions: values of `--precision`, the default first.
        sources: decoder source -> the precisions that it makes for the engine, the default source first.
        every_expert: decoder sources whose graphs compute every expert for every token.
        cache_bytes: precision -> bytes of a cache element; 4 if it is not named.
        mapped: decoder source -> the precisions whose export leaves the weights in the checkpoint's files.
        rounded: of these, the precisions whose export holds one matrix in float32 at a time.
        balanced: precisions whose export reads a part of the calibration text, to round activations by channel.
        narrow: whether the engine computes in fewer bits than the graph's types state, unless the precision is fp32.
        static: whether the engine compiles graphs of the static form, with caches of --max-seq-len slots, which count
            0..K-1. A CPU verifies a float32 copy of such a graph. The build stage makes the engine that runs.
        needs_target_gpu: whether exports may be for another machine; bench is left out if the engine does not run here.
        provider: ONNX Runtime's execution provider, which the exporter is told.
        providers: ONNX Runtime's other execution providers, which the engine can run with.
        kinds: methods (`nbl_export.methods`) that its decoders hold; None for every method.
        verified_by: the engine that verifies the graphs; "" is the engine itself.
        faster_on_cpu: an engine that reads prompts faster on a CPU, as docs/results.md measures; "" if none does.
        refused_rotary: types of rotary embeddings that its graphs cannot have, as config.json names them.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    kinds: frozenset[str] | None = LINEAR_KINDS
    cache_bytes: Mapping[str, int] = field(default_factory=dict)
    mapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rounded: tuple[str, ...] = ()
    balanced: tuple[str, ...] = ()
    narrow: bool = False
    static: bool = False
    needs_target_gpu: bool = False
    provider: str = "cpu"
    providers: tuple[str, ...] = ()
    every_expert: tuple[str, ...] = ()
    verified_by: str = ""
    faster_on_cpu: str = ""
    refused_rotary: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """The default decoder source."""
        return next(iter(self.sources))

    def cache_itemsize(self, precision: str) -> int:
        """Bytes of a cache element."""
        return self.cache_bytes.get(precision, 4)

    def holds(self, kind: str) -> bool:
        """Whether its decoders hold a method."""
        return self.kinds is None or kind in self.kinds
