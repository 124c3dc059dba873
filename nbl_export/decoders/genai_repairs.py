"""Classes of the GenAI builder (0.18) with which it gets through where it stops; what they write is held to torch.

SmolLM3   a layer without rotary embedding would get a separate one, on positions that the graph does not have
Gemma 3   rotary settings by kind of layer, as transformers 5 has them, are not read
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
    before = {name: getattr(builder, name) for name in ours}
    try:
        for name, kind in ours.items():
            setattr(builder, name, kind)
        yield
    finally:
        for name, kind in before.items():
            setattr(builder, name, kind)


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
