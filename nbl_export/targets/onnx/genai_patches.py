"""Patches of the GenAI builder (0.18) for models that it cannot export; verification compares the graphs with torch.

SmolLM3   the builder gives a layer without rotary embedding a separate one, on positions that the graph lacks
Gemma 3   the builder does not read rotary settings by kind of layer, as transformers 5 has them
codes     the builder cannot join query, key and value of a quantised checkpoint without zero points into one matrix
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["repaired"]


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Patch the builder inside the block."""
    from onnxruntime_genai.models import builder

    ours = {"SmolLM3Model": _smollm3(builder.SmolLM3Model), "Gemma3Model": _gemma3(builder.Gemma3Model)}
    base = next(kind for kind in builder.LlamaModel.__mro__ if _PACKED in vars(kind))
    changes = [
        *((builder, name, kind) for name, kind in ours.items()),
        (base, _PACKED, _packed(getattr(base, _PACKED))),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


_PACKED = "make_packed_matmul_int4_class"


def _packed(theirs: Any) -> Any:
    """Join query, key and value; the builder's method also joins zero points, which symmetric codes lack."""

    def joined(self: Any, *parts: Any) -> Any:
        if any(getattr(part, "qzeros", True) is not None for part in parts):
            return theirs(self, *parts)
        for part in parts:
            part.qzeros = part.scales[:0]
        whole = theirs(self, *parts)
        whole.qzeros = None
        return whole

    return joined


def _smollm3(base: Any) -> Any:
    class SmolLM3Model(base):
        def make_attention_qk_rope(self, layer_id: int, **kwargs: Any) -> Any:
            if not self.no_rope_layers[layer_id]:
                return "", ""
            return super().make_attention_qk_rope(layer_id, **kwargs)

    return SmolLM3Model


def _gemma3(base: Any) -> Any:
    class Gemma3Model(base):
        def make_rope_init(self, config: Any) -> None:
            config.rope_local_base_freq = config.rope_parameters["sliding_attention"]["rope_theta"]
            self.rope_attrs["theta"] = config.rope_parameters["full_attention"]["rope_theta"]

    return Gemma3Model
