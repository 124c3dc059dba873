"""Compiled engines: what the build stage made of both graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_export.report import words
from nbl_export.report.blocks import Paragraph, Section
from nbl_export.report.sections.speed import compared

__all__ = ["sections"]

_ATTENTION = {
    "fused": "Attention runs in fused kernels.",
    "decomposed": "Attention is decomposed into matrix products, because the library has no fused kernel for it.",
}


def sections(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, or none if nothing was compiled."""
    if not report["engines"]:
        return ()
    before, after = report["engines"]["original"], report["engines"]["nbl"]

    def row(name: str, key: str, spoken: Any) -> tuple[str, str, str, str]:
        return name, spoken(before[key]), spoken(after[key]), words.change(before[key], after[key])

    table = compared([
        row("Build time", "build_seconds", words.duration),
        row("Engine on disk", "plan_bytes", words.size),
        row("KV cache per token", "cache_bytes_per_token", words.size),
        row("KV cache of all slots", "cache_bytes", words.size),
        row("Layers with a cache", "cache_layers", str),
    ])  # fmt: skip
    return (Section("Engines", (Paragraph(_setting(before)), table)),)


def _setting(engine: Mapping[str, Any]) -> str:
    batch = f"{engine['max_batch']} {words.plural('sequence', engine['max_batch'])}"
    return (
        f"Compiled by {engine['engine']} {engine['version']} in {engine['precision']} for compute capability "
        f"{words.listed(engine['compute_capabilities'])}. "
        f"An engine takes up to {batch} of {engine['max_seq_len']:,} tokens, and prefill in chunks of "
        f"{engine['prefill_chunk']}. {_ATTENTION[engine['attention']]} "
        "The graphs were verified on a CPU, as float32 graphs of the same nodes."
    )
