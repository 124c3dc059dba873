"""Classes of the GenAI builder (0.18) with which it gets through where it stops; what they write is held to torch.

SmolLM3   a layer without rotary embedding would get a separate one, on positions that the graph does not have
Gemma 3   rotary settings by kind of layer, as transformers 5 has them, are not read
codes     of a quantised checkpoint without zero points are not put side by side (query, key and value as one matrix)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["repaired"]


@contextlib.contextmanager
def repaired() -> Iterator[None]:
    """Within: the builder uses them."""
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
    """Theirs joins the zero points of the three; symmetric codes have none."""

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
