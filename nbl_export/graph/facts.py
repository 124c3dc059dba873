"""What a decoder graph says of itself, as JSON values: sizes, caches, precision, layers that are replaced.

Sizes come from weights and caches, never from names. The hidden size is the input width of a block's first products.
The number of query heads is the input width of a block's last product, divided by the head size of the cache.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.files import read_json
from nbl_export.graph.anatomy import PRODUCTS, AttentionBlock, graph_caches, is_constant
from nbl_export.graph.names import GENAI_CONFIG

__all__ = ["QUANTISES", "architecture_of", "decoder_facts", "hidden_size", "logits_of", "replaced_layers"]

QUANTISES = ("DynamicQuantizeLinear", "QuantizeLinear")


_TRANSPARENT = ("Identity", "Cast", "DequantizeLinear")


def decoder_facts(graph: ir.Graph, blocks: list[AttentionBlock], directory: Path | None) -> dict[str, Any]:
    """The fields of `records.decoder.DecoderSpec`; None if the graph does not state a field."""
    caches = graph_caches(graph)
    past = next(iter(caches.values()))[0][0]
    stated = architecture_of(directory)
    kv_heads, head = _dimension(past, 1), _dimension(past, 3)
    heads, attended = None, None
    if blocks:
        heads = _attribute(blocks[0], "num_heads") or _attribute(blocks[0], "q_num_heads")
        kv_heads = kv_heads or _attribute(blocks[0], "kv_num_heads")
        attended = _dims(_last_product(blocks[0].branch))
        if attended is not None and heads is None and head:
            heads = attended[0] // head
        if attended is not None and heads:
            head = head or attended[0] // heads
    return {
        "architecture": stated.get("architecture"),
        "num_layers": max([*caches, -1, (stated.get("num_layers") or 0) - 1]) + 1,
        "hidden_size": hidden_size(blocks[0]) if blocks else None,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head,
        "vocab_size": _vocabulary(graph),
        "max_positions": stated.get("max_positions"),
        "sliding_window": max((w for w in map(_window, blocks) if w is not None), default=None),
    }


def architecture_of(directory: Path | None) -> dict[str, Any]:
    """Architecture, num_layers and max_positions, from config.json and genai_config.json beside a graph."""
    config, genai = ({} if directory is None else _json(directory / n) for n in ("config.json", GENAI_CONFIG))
    model = _mapping(genai.get("model"))
    decoder = _mapping(model.get("decoder"))
    kind = config.get("model_type")
    return {
        "architecture": kind if isinstance(kind, str) else model.get("type"),
        "num_layers": _whole(config.get("num_hidden_layers")) or _whole(decoder.get("num_hidden_layers")),
        "max_positions": _whole(config.get("max_position_embeddings")) or _whole(model.get("context_length")),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return _mapping(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def hidden_size(block: AttentionBlock) -> int | None:
    """Width of the residual stream: the input width of the first products, else a stated dimension, else None."""
    for value in block.projected:
        for node in value.consumers():
            dims = _dims(node)
            if dims is not None:
                return dims[0]
    return _dimension(block.residual, 2)


def _dims(node: ir.Node | None) -> tuple[int, int] | None:
    """Input and output width of a product, from its weight."""
    if node is None or node.op_type not in PRODUCTS:
        return None
    if node.op_type in QUANTISES:
        return next((d for user in node.outputs[0].consumers() if (d := _dims(user)) is not None), None)
    if "K" in node.attributes and "N" in node.attributes:
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    weight = next((v for v in node.inputs[1:2] if v is not None and is_constant(v)), None)
    shape = None if weight is None else _shape_of(weight)
    if shape is None or len(shape) != 2:
        return None
    flipped = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return (shape[1], shape[0]) if flipped else (shape[0], shape[1])


def _shape_of(value: ir.Value) -> list[int] | None:
    """Shape of a constant, also behind casts and a transposition."""
    if value.const_value is not None:
        return [int(d) for d in value.const_value.shape.numpy()]
    node = value.producer()
    if node is None or not node.inputs or node.inputs[0] is None:
        return None
    inner = _shape_of(node.inputs[0])
    if node.op_type == "Transpose":
        return None if inner is None else inner[::-1]
    return inner if node.op_type in _TRANSPARENT else None


def _last_product(value: ir.Value, depth: int = 12) -> ir.Node | None:
    """The nearest product before a value (o_proj before a branch)."""
    waiting = [value]
    for _ in range(depth):
        nodes = [node for v in waiting if (node := v.producer()) is not None]
        for node in nodes:
            if node.op_type in PRODUCTS and node.op_type not in QUANTISES:
                return node
        waiting = [v for node in nodes for v in node.inputs if v is not None and not is_constant(v)]
    return None


def _attention(block: AttentionBlock) -> list[ir.Node]:
    return [node for past in block.pasts for node in past.consumers() if node.op_type not in ("Shape", "Size")]


def _attribute(block: AttentionBlock, name: str) -> int | None:
    values = (node.attributes[name].as_int() for node in _attention(block) if name in node.attributes)
    return next((value for value in values if value > 0), None)


def _window(block: AttentionBlock) -> int | None:
    return _attribute(block, "local_window_size")


def _dimension(value: ir.Value, index: int) -> int | None:
    shape = value.shape
    dim = None if shape is None or len(shape) <= index else shape[index]
    if isinstance(dim, ir.SymbolicDim) and (dim.value or "").isdecimal():
        return int(str(dim.value))  # torch.export names a dimension of size 16 "16"
    return dim if isinstance(dim, int) else None


def _output(graph: ir.Graph) -> ir.Value | None:
    return next((v for v in graph.outputs if v.name == "logits"), None)


def logits_of(graph: ir.Graph) -> str | None:
    """Which logits the graph gives, "last" or "all"; None if no output is named logits."""
    value = _output(graph)
    return None if value is None else "last" if _dimension(value, 1) == 1 else "all"


def _vocabulary(graph: ir.Graph) -> int | None:
    value = _output(graph)
    if value is None:
        return None
    dims = _dims(_last_product(value, 6))
    return _dimension(value, 2) or (dims[1] if dims is not None else None)


def replaced_layers(graph: ir.Graph) -> list[int]:
    """Layers whose attention a map has replaced, by the names of their constants."""
    found = (re.match(r"nbl\.layers\.(\d{1,9})\.", name) for name in graph.initializers)
    return sorted({int(match[1]) for match in found if match})
