"""Attention of a network: a fused kernel of the library, or the matrix products and softmax that it is made of.

    fused        one kernel; the library has it for some head sizes, numbers of heads and types
    decomposed   scores [B, heads, tokens, slots] go through memory; every size builds

Attention of a parsed network may not be decomposed unless the network says so. Without a kernel its build fails
("Attention operation was not supported by a dedicated kernel"). So `build` decomposes on purpose, and records it.

The parser multiplies queries and keys by sqrt(scale), even if the scale is 1, as in the static form (seen with
TensorRT-RTX 1.7.1). The keys are the whole cache. So `bypass_unit_scale` takes the products with 1 out of the way.

    before   KV_CACHE_UPDATE ─ ELEMENTWISE (x 1) ─ ATTENTION_INPUT      after   KV_CACHE_UPDATE ─ ATTENTION_INPUT

The bindings hand every layer out as ILayer. To assign its class is the cast that NVIDIA's Polygraphy makes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nbl_export.targets.tensorrt.library import Library
from nbl_export.targets.tensorrt.network import ParsedNetwork

__all__ = ["DECOMPOSED", "FUSED", "bypass_unit_scale", "decompose", "lacks_kernel"]

FUSED, DECOMPOSED = "fused", "decomposed"


def lacks_kernel(library: Library, parsed: ParsedNetwork) -> str:
    """Why the library is known to have no fused kernel for this network, or "" if only its builder can tell."""
    if library.fused is None:
        return ""
    for layer in _attention_layers(parsed):
        _, heads, _, size = layer.get_input(0).shape
        if reason := library.fused.lacks(heads, size, parsed.precision):
            return f"{library.capabilities.title} has no fused attention kernel for {reason}"
    return ""


def decompose(parsed: ParsedNetwork) -> bool:
    """Allow the builder to decompose every attention of a network; returns whether there is any."""
    layers = list(_attention_layers(parsed))
    for layer in layers:
        layer.__class__ = parsed.trt.IAttentionInputLayer
        layer.attention.decomposable = True
    return bool(layers)


def bypass_unit_scale(parsed: ParsedNetwork) -> None:
    """Give attention its queries and keys past products with 1."""
    made_by = {layer.get_output(i).name: layer for layer in parsed.layers for i in range(layer.num_outputs)}
    for layer in _attention_layers(parsed):
        layer.__class__ = parsed.trt.IAttentionInputLayer
        for index in (0, 1):
            product = made_by.get(layer.get_input(index).name)
            if product is not None and _multiplies_by_one(parsed.trt, product, made_by):
                layer.attention.set_input(index, product.get_input(0))


def _multiplies_by_one(trt: Any, layer: Any, made_by: Mapping[str, Any]) -> bool:
    if layer.type != trt.LayerType.ELEMENTWISE:
        return False
    layer.__class__ = trt.IElementWiseLayer
    constant = made_by.get(layer.get_input(1).name)
    while constant is not None and constant.type == trt.LayerType.CAST:
        constant = made_by.get(constant.get_input(0).name)
    if constant is None or constant.type != trt.LayerType.CONSTANT or layer.op != trt.ElementWiseOperation.PROD:
        return False
    constant.__class__ = trt.IConstantLayer
    return bool(np.all(np.asarray(constant.weights) == 1))


def _attention_layers(parsed: ParsedNetwork) -> Iterator[Any]:
    return (layer for layer in parsed.layers if layer.type == parsed.trt.LayerType.ATTENTION_INPUT)
