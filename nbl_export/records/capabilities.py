"""What differs between engines, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbl_export.records.proposers import Proposer

__all__ = ["Capabilities"]


@dataclass(frozen=True)
class Capabilities:
    """What differs between engines; no other code asks for an engine's name.

    Attributes:
        precisions: values of `--precision`, the default first.
        sources: decoder source -> the precisions that it makes for the engine, the default source first.
        extra: optional extra that installs the engine.
        cache_bytes: precision -> bytes of a cache element; 4 if it is not named.
        graphs: format of the decoder graphs, "onnx" or "ir" (OpenVINO).
        static: whether the engine compiles graphs of the static form, with caches of --max-seq-len slots. A CPU
            verifies such a graph through its float32 twin (a float32 copy). The build stage makes the engine that runs.
        profiled: whether operators can be timed.
        cross: whether exports may be for another machine; bench is left out if the engine does not run here.
        dense_caches: whether caches count 0..K-1.
        provider: ONNX Runtime's execution provider, which the exporter is told.
        proposers: who can propose tokens that the engine verifies (`--draft`); empty if nobody can.
    """

    name: str
    title: str
    precisions: tuple[str, ...]
    sources: Mapping[str, tuple[str, ...]]
    extra: str
    cache_bytes: Mapping[str, int] = field(default_factory=dict)
    graphs: str = "onnx"
    static: bool = False
    profiled: bool = False
    cross: bool = False
    dense_caches: bool = False
    provider: str = "cpu"
    proposers: tuple[Proposer, ...] = ()

    @property
    def source(self) -> str:
        """The default decoder source."""
        return next(iter(self.sources))

    def cache_itemsize(self, precision: str) -> int:
        """Bytes of a cache element."""
        return self.cache_bytes.get(precision, 4)
