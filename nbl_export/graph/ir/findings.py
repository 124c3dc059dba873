"""What makes an IR slow at reading prompts on OpenVINO's CPU plugin.

    head        logits of all tokens, though generation needs those of the last token
    attention   products and a Softmax: the plugin disables SDPAFusion, and the paged back end refuses such a graph
    float       no product has weights in codes
    blocks      activations are rounded to 8 bits in groups, and these must divide the groups of weights
    activations the plugin rounds in groups of 32 by itself, and not at all if a named size does not divide the weights'

The last two were measured on a processor without AMX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.graph.ir.files import GROUP_OPTION, read_ir
from nbl_export.graph.names import IR_FILE, IR_WEIGHTS
from nbl_export.records.findings import BLOCK, Finding
from nbl_export.trust.contained import check_folder

__all__ = ["describe_ir", "find_slow"]

_FLOATS = ("f64", "f32", "f16", "bf16")
_DECODES = ("Convert", "Reshape", "Transpose", "Subtract", "Multiply", "FakeQuantize")  # a matrix's way to its product
_MOST_STEPS = 16  # of such a way
_TAKES_TOKENS = ("Gather", "GatherND", "Slice", "StridedSlice")
_PLUGIN_GROUP = 32  # activations of a group, if nobody names a size


@dataclass(frozen=True)
class _Product:
    """A product with a matrix of weights.

    Attributes:
        kind: type of the matrix as it is stored.
        group: weights that share a scale; 0 for one scale an output, or for float weights.
    """

    name: str
    kind: str
    group: int


def describe_ir(directory: Path) -> dict[str, Any]:
    """Describe a directory's IR, and what makes it slow at reading prompts.

    Raises:
        CorruptError: a file is missing, cut, no IR, or a link out of the directory.
        MissingPackageError: openvino is not installed.
        NblError: the IR is no decoder.
    """
    check_folder(directory)
    model = read_ir(directory)
    logits = _logits(model)
    if logits is None:
        raise NblError(f"{directory / IR_FILE} has no output named logits; name the directory of a decoder")
    return {
        "graph": str(directory / IR_FILE),
        "bytes": sum((directory / name).stat().st_size for name in (IR_FILE, IR_WEIGHTS)),
        "states": sum(node.get_type_name() == "ReadValue" for node in model.get_ops()),
        "logits": "last" if _is_of_one_token(logits) else "all",
        "findings": [asdict(finding) for finding in find_slow(model)],
    }


def find_slow(model: Any) -> list[Finding]:
    """The traits of a decoder that slow the reading of prompts."""
    flow = _Flow(model)
    products = list(flow.products.values())
    coded = [product for product in products if product.kind not in _FLOATS]
    found = [*_head(model, flow), *_attention(flow)]
    if products and not coded:
        kinds = ", ".join(sorted({product.kind for product in products}))
        found.append(
            Finding(
                f"weights are float ({kinds}): no product has weights in codes",
                len(products),
                "compress to int8 or int4 (optimum-cli --weight-format int8); measure the loss",
            )
        )
    return [*found, *_blocks(coded), *_activations(model, coded)]


class _Flow:
    """What is computed from what, in one walk; a product with weights begins anew. Nodes are known by their names.

    Attributes:
        products: products with a matrix of weights.
        attention: number of nodes that are a Softmax of a product of two computed values. The Softmax of a router of
            experts has weights before it.
        chosen: nodes that are computed from a choice among tokens, and products with weights of such nodes.
    """

    def __init__(self, model: Any) -> None:
        self.products: dict[str, _Product] = {}
        self.attention = 0
        self.chosen: set[str] = set()
        self._moving: set[str] = set()
        self._scores: set[str] = set()
        for node in model.get_ordered_ops():
            self._visit(node, [value.get_node() for value in node.input_values()])

    def _visit(self, node: Any, given: list[Any]) -> None:
        name = node.get_name()
        kind = node.get_type_name()
        moving = [other.get_name() for other in given if other.get_name() in self._moving]
        if kind not in ("Parameter", "ReadValue") and not moving:
            return
        self._moving.add(name)
        if kind == "ShapeOf":
            return
        values = node.input_values() if kind == "MatMul" else ()
        stored = [found for value in values if (found := self._stored(value))]
        if stored:
            self.products[name] = _Product(name, *stored[0])
            if not self.chosen.isdisjoint(moving):
                self.chosen.add(name)
            return
        behind = any(other in self._scores for other in moving)
        if behind or (kind == "MatMul" and len(moving) == 2):
            self._scores.add(name)
        self.attention += behind and kind == "Softmax"
        takes = kind in _TAKES_TOKENS and given[0].get_name() in moving and given[0].get_type_name() != "ShapeOf"
        if takes or any(other in self.chosen and other not in self.products for other in moving):
            self.chosen.add(name)

    def _stored(self, value: Any) -> tuple[str, int] | None:
        """Type of a matrix of weights, and the weights that share a scale; None for a computed value or a vector."""
        node = value.get_node()
        shape = value.get_partial_shape()
        if node.get_name() in self._moving or shape.is_dynamic or len([d for d in shape.to_shape() if d > 1]) < 2:
            return None
        scales = 0
        is_rounded = False
        for _ in range(_MOST_STEPS):
            step = node.get_type_name()
            if step not in _DECODES:
                break
            is_rounded |= step == "FakeQuantize"
            if step == "Multiply":
                scales = _count(node.input_value(1))
            node = node.input_value(0).get_node()
        stored = node.output(0)
        kind = "8 bits" if is_rounded else stored.get_element_type().to_string()
        is_grouped = scales and len(stored.get_partial_shape()) > len(shape)
        return kind, _count(stored) // scales if is_grouped else 0


def _logits(model: Any) -> Any:
    return next((value for value in model.outputs if "logits" in value.get_names()), None)


def _is_of_one_token(logits: Any) -> bool:
    shape = logits.get_partial_shape()
    return bool(shape.rank.is_static and shape.rank.get_length() == 3 and shape[1] == 1)


def _count(value: Any) -> int:
    """Elements of a value; 0 if its shape is not known."""
    shape = value.get_partial_shape()
    return 0 if shape.is_dynamic else math.prod(shape.to_shape())


def _head(model: Any, flow: _Flow) -> Iterator[Finding]:
    logits = _logits(model)
    if logits is None or _is_of_one_token(logits):
        return
    heads = list(_heads(logits.get_node(), flow))
    last = logits.get_node().input_value(0).get_node().get_name()
    if not heads or not flow.chosen.isdisjoint((last, *heads)):
        return
    what = "the head computes logits of all tokens of a prompt"
    gather = "put a Gather of the last token in front of the head"
    if _genai_cuts(model):
        what = f"{what}, but in OpenVINO GenAI"
        advice = f"nothing for OpenVINO GenAI, which takes the last token when it loads the graph; for others {gather}"
    else:
        advice = f"{gather}: OpenVINO GenAI does not recognise this head either"
    yield Finding(what, len(heads), advice)


def _heads(result: Any, flow: _Flow) -> Iterator[str]:
    """Names of the nearest products with weights that a result is computed from."""
    waiting = [result]
    seen = set()
    while waiting:
        for value in waiting.pop().input_values():
            node = value.get_node()
            name = node.get_name()
            if name in seen:
                continue
            seen.add(name)
            if name in flow.products:
                yield name
            else:
                waiting.append(node)


def _genai_cuts(model: Any) -> bool:
    """Whether OpenVINO GenAI finds the head of a graph, in front of which both of its back ends take tokens.

    utils.cpp of GenAI, find_llm_matmul: MatMul, MatMul - Add, MatMul - Transpose, MatMul - Divide - Tanh - Multiply.
    """
    node = model.output(0).get_node().input_value(0).get_node()
    steps = {"Add": (), "Transpose": (), "Multiply": ("Tanh", "Divide")}.get(node.get_type_name())
    for kind in () if steps is None else (*steps, "MatMul"):
        node = node.input_value(0).get_node()
        if node.get_type_name() != kind:
            return False
    rank = node.get_input_partial_shape(0).rank if node.get_type_name() == "MatMul" else None
    return rank is not None and rank.is_static and rank.get_length() == 3


def _attention(flow: _Flow) -> Iterator[Finding]:
    if flow.attention:
        yield Finding(
            "attention is products and a Softmax, not ScaledDotProductAttention",
            flow.attention,
            "export with sdpa attention, if the model has it: without, OpenVINO GenAI takes its slower back end",
        )


def _blocks(coded: Sequence[_Product]) -> Iterator[Finding]:
    small = [product.group for product in coded if 0 < product.group < BLOCK]
    if small:
        yield Finding(
            f"groups are small: {' or '.join(map(str, sorted(set(small))))} weights share a scale",
            len(small),
            f"compress in groups of {BLOCK} (optimum-cli --group-size {BLOCK}), which lets "
            f"activations have such groups too; measure the loss",
        )


def _activations(model: Any, coded: Sequence[_Product]) -> Iterator[Finding]:
    path = ["runtime_options", GROUP_OPTION]
    named = str(model.get_rt_info(path).value) if model.has_rt_info(path) else ""
    size = int(named) if named.isdecimal() and len(named) < 10 else _PLUGIN_GROUP
    best = min([BLOCK, *(product.group for product in coded if product.group)])
    left = [product for product in coded if not size or product.group % size]
    advice = f'load with {GROUP_OPTION}="{best}" (on processors without AMX)'
    if left:
        yield Finding(f"activations stay in float: they are to be rounded in groups of {size}", len(left), advice)
    elif coded and size < best:
        yield Finding(f"activations are rounded to 8 bits in groups of {size}", len(coded), advice)
