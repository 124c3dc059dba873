"""Parses decoder.onnx into a TensorRT network, or says why not, and prepares its attention, before anything is built.

The parser is silent about two faults: an input that it drops (the mask is then missing), and a file that is not ONNX
(an empty network without an error). This module looks for both.

Attention of a network is a fused kernel of the library, or the matrix products and softmax that it is made of:

    fused            one kernel; the library has it for some head sizes, numbers of heads and types
    decomposable     the builder may multiply matrices; scores [B, heads, tokens, slots] then go through memory

Attention of a parsed network may not be decomposed unless the network says so. Without a kernel its build fails
("Attention operation was not supported by a dedicated kernel"). So `build` allows it on purpose, and records it.

The parser multiplies queries and keys by sqrt(scale), even if the scale is 1, as in the static form. The builder of
TensorRT-RTX 1.7.1 has no scratch memory for such keys, which are the whole cache (tests/targets/test_trt_large.py).

The bindings hand every layer out as ILayer. To assign its class is the cast that NVIDIA's Polygraphy makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.records.decoder import ITEMSIZE, GraphContract, TensorInfo
from nbl_export.targets.tensorrt.messages import Messages, changes, require

__all__ = ["DECOMPOSABLE", "FUSED", "ParsedNetwork", "allow_decomposing", "copied_heads", "parse"]

_DTYPES = {
    "HALF": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
FUSED = "fused"
DECOMPOSABLE = "decomposable"
_PRECISIONS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class ParsedNetwork:
    """A network and the objects that must outlive it: the parser owns the weights."""

    trt: Any
    builder: Any
    network: Any
    parser: Any

    @property
    def contract(self) -> GraphContract:
        """Inputs and outputs of the network."""
        net = self.network
        inputs = tuple(_info(net.get_input(i)) for i in range(net.num_inputs))
        outputs = tuple(_info(net.get_output(i)) for i in range(net.num_outputs))
        layers = {int(info.name.split(".")[1]) for info in inputs if info.name.startswith("past_key_values.")}
        return GraphContract(inputs, outputs, tuple(sorted(layers)))

    @property
    def precision(self) -> str:
        """fp16, bf16 or fp32; int4 if any matrix is int4."""
        kinds = self.trt.LayerType
        if any(
            layer.type == kinds.DEQUANTIZE and layer.get_input(0).dtype == self.trt.DataType.INT4
            for layer in self.layers
        ):
            return "int4"
        return _PRECISIONS[_cache(self.contract).dtype]

    @property
    def layers(self) -> Iterator[Any]:
        """All layers."""
        return (self.network.get_layer(i) for i in range(self.network.num_layers))


def parse(trt: Any, log: Messages, path: Path) -> ParsedNetwork:
    """Parse a graph, with its external data beside it.

    Raises:
        NblError: the parser refuses the graph, or would change it or drop one of its inputs.
    """
    # a warning about the machine is no reason against the graph, so the parser's block begins behind this one
    with log.explaining("TensorRT makes no builder"):
        builder = trt.Builder(log.logger)
        # TensorRT 11 is always strongly typed and ignores the flag; TensorRT 10 and RTX need it
        network = require(builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)))
    with log.explaining(f"TensorRT's parser refuses {path}") as said:
        parser = trt.OnnxParser(network, log.logger)
        good = parser.parse_from_file(str(path))
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        if not good or errors or network.num_outputs == 0:
            why = [f"{e.node_name() or 'the graph'} ({e.node_operator() or 'model'}): {e.desc()}" for e in errors]
            raise NblError(f"TensorRT's parser refuses {path}: {why[0] if why else 'it is not an ONNX model'}")
        if changed := changes(said):
            raise NblError(f"TensorRT's parser would change {path}, so no engine is built: {changed[0]}")
    network.name = path.parent.name
    parsed = ParsedNetwork(trt, builder, network, parser)
    if unread := _unread_inputs(parsed):
        raise NblError(
            f"TensorRT's parser ignores the input {unread[0]} of {path}; its engine would compute something else"
        )
    return parsed


def _unread_inputs(parsed: ParsedNetwork) -> list[str]:
    """Inputs that no layer reads."""
    read = {
        tensor.name
        for layer in parsed.layers
        for k in range(layer.num_inputs)
        if (tensor := layer.get_input(k)) is not None
    }
    net = parsed.network
    return [name for i in range(net.num_inputs) if (name := net.get_input(i).name) not in read]


def _info(tensor: Any) -> TensorInfo:
    shape = tuple(("batch" if axis == 0 else "tokens") if n < 0 else int(n) for axis, n in enumerate(tensor.shape))
    return TensorInfo(tensor.name, _DTYPES.get(tensor.dtype.name, tensor.dtype.name.lower()), shape)


def _cache(contract: GraphContract) -> TensorInfo:
    for info in contract.inputs:
        if info.name.startswith("past_key_values."):
            return info
    raise NblError("the graph has no caches; only decoders of the static form are built")


# -- attention -----------------------------------------------------------------------------------------


def copied_heads(parsed: ParsedNetwork, rows: int) -> tuple[int, int, int]:
    """Query heads, heads of the cache, and bytes of a layer's keys and values if each query head has its own."""
    cache = _cache(parsed.contract)
    queries = int(next(_attention_layers(parsed)).get_input(0).shape[1])
    held, slots, head = map(int, cache.shape[1:])
    return queries, held, 2 * rows * queries * slots * head * ITEMSIZE[cache.dtype]


def allow_decomposing(parsed: ParsedNetwork) -> bool:
    """Allow the builder to decompose every attention of a network; returns whether there is any."""
    layers = list(_attention_layers(parsed))
    for layer in layers:
        layer.__class__ = parsed.trt.IAttentionInputLayer
        layer.attention.decomposable = True
    return bool(layers)


def _attention_layers(parsed: ParsedNetwork) -> Iterator[Any]:
    return (layer for layer in parsed.layers if layer.type == parsed.trt.LayerType.ATTENTION_INPUT)
