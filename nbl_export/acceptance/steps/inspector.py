"""The step that reads the engine's layers: a fused attention, and no product over a whole cache.

A decoder reads its caches at every step. An engine that first multiplies the keys reads and writes them once more. The
names of the kernels are the library's, and nobody promises them. So the step fails on evidence alone: a softmax of its
own without any fused attention, or a product as large as a cache. If the names tell nothing, the step is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.verdict import Failed, LeftOut, Notes
from nbl_export.targets.tensorrt.attention import FUSED

__all__ = ["layers_of", "look_at_layers"]

# "mha" names NVIDIA's fused attention kernels: "_gemm_mha_v2" in TensorRT's logs (NVIDIA/TensorRT#3575), "fmha".
_FUSED = re.compile(r"mha|flash", re.IGNORECASE)
_SOFTMAX = re.compile(r"softmax", re.IGNORECASE)
_MULTIPLIES = re.compile(r"(^|[^a-z])(mul|scale|prod)", re.IGNORECASE)
_UPDATES = re.compile(r"kv_?cache|scatter|update", re.IGNORECASE)
_LONGEST = 300  # layers that are recorded


def look_at_layers(target: Target, notes: Notes) -> None:
    """The inspector shows a fused attention, and no layer that multiplies a whole cache."""
    told = False
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            notes.doing(f"asking the inspector for the layers of {opened.subject}")
            layers = layers_of(opened.inside.layers())
            notes.see(f"{opened.subject}, layers", len(layers))
            if layers:
                notes.see(f"{opened.subject}, names", [name for name, _ in layers[:_LONGEST]])
                told = _judge(opened, layers, notes) or told
    if not told:
        raise LeftOut("the names of the layers tell nothing about attention")


def layers_of(told: Any) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Name and output shapes of each layer, of the inspector's JSON; names alone have no shapes.

    The JSON has "Layers": names, or objects with Name, LayerType, TacticName and Outputs with Dimensions.
    """
    layers = told.get("Layers", []) if isinstance(told, dict) else []
    return [_layer(layer) for layer in layers]


def _layer(layer: Any) -> tuple[str, list[tuple[int, ...]]]:
    if not isinstance(layer, dict):
        return str(layer), []
    name = " ".join(str(layer[key]) for key in ("Name", "LayerType", "TacticName") if layer.get(key))
    return name, list(_shapes(layer.get("Outputs", [])))


def _shapes(outputs: Any) -> Iterator[tuple[int, ...]]:
    for output in outputs if isinstance(outputs, list) else []:
        dims = output.get("Dimensions") if isinstance(output, dict) else None
        if isinstance(dims, list) and all(isinstance(n, int) for n in dims):
            yield tuple(dims)


def _judge(opened: Opened, layers: list[tuple[str, list[tuple[int, ...]]]], notes: Notes) -> bool:
    """Whether the names tell anything about attention."""
    fused, single = (sum(bool(kind.search(name)) for name, _ in layers) for kind in (_FUSED, _SOFTMAX))
    notes.see(f"{opened.subject}, layers whose name is of a fused attention", fused)
    notes.see(f"{opened.subject}, layers whose name is of a softmax", single)
    caches = {tuple(int(n) for n in i.shape[1:]) for i in opened.record.inputs if "past_key_values" in i.name}
    for name, shapes in layers:
        over_cache = any(shape[-3:] in caches for shape in shapes)
        if over_cache and _MULTIPLIES.search(name) and not (_FUSED.search(name) or _UPDATES.search(name)):
            raise Failed(f"{opened.subject}: the layer {name[:200]} multiplies a whole cache at every step")
    if single and not fused and opened.record.attention == FUSED:
        raise Failed(
            f"{opened.subject}: {single} of {len(layers)} layers are a softmax, and no name is of a fused attention"
        )
    return bool(fused or single)
