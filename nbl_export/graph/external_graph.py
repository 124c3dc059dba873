"""A decoder graph of any exporter, as `inspect` and `rewrite-graph` take it: its files, and what is recognised in it.

DIR/model.onnx, or DIR/onnx/model.onnx, with its data ─┬─► the graph (`graph.files`) ─► layers, hidden size, logits
config.json, genai_config.json, tokenizer, ...        ─┴─► `companions`, which go with the graph

The hidden size is the input width of a block's first products, as their weights say, never a name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.errors import RefusalError
from nbl_export.files import read_json
from nbl_export.graph.anatomy import PRODUCTS, AttentionBlock, find_block, graph_caches, is_constant
from nbl_export.graph.files import data_files, find_graph, load_graph
from nbl_export.graph.findings import find_slow
from nbl_export.graph.genai_config import check_genai_config, providers_of
from nbl_export.graph.names import GENAI_CONFIG, MANIFEST, TEXT_FILES, goes_with_graph
from nbl_export.trust.contained import check_folder, check_inside, refuse_special

__all__ = [
    "check_graph_place",
    "companions",
    "config_dir_of",
    "decoder_facts",
    "describe_graph",
    "logits_of",
    "replaced_layers",
]

log = logging.getLogger(__name__)
_BESIDE_A_FILE = (*TEXT_FILES, GENAI_CONFIG)
_QUANTISES = ("DynamicQuantizeLinear", "QuantizeLinear")
_TRANSPARENT = ("Identity", "Cast", "DequantizeLinear")


# -- files -----------------------------------------------------------------------------------------------------


def config_dir_of(graph: Path) -> Path:
    """The directory of a graph's configuration and tokenizer: its own, or the parent if the graph lies in DIR/onnx."""
    inside = graph.parent.name == "onnx" and not (graph.parent / "config.json").is_file()
    return graph.parent.parent if inside else graph.parent


def check_graph_place(path: Path) -> None:
    """Check a folder, or a file and what is read beside it.

    Raises:
        CorruptError: names an entry that is a link out of the folder, a pipe, a socket or a device.
    """
    if path.is_dir():
        check_folder(path)
        return
    for file in (path, *(path.parent / name for name in _BESIDE_A_FILE)):
        refuse_special(file)
        check_inside(file, path.parent)


def companions(path: Path, skipped: set[Path]) -> Iterator[tuple[Path, Path]]:
    """Files that belong to the graph, and their names in the output. Code and pickles do not belong to a graph.

    Raises:
        CorruptError: a file is a link that leads out of the directory.
        NblError: genai_config.json has a refused key.
    """
    check_genai_config(path.parent if path.is_file() else path)
    if path.is_file():
        files = [path.parent / name for name in _BESIDE_A_FILE if (path.parent / name).is_file()]
        directory = path.parent
    else:
        directory = path
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    left_out: list[str] = []
    for file in files:
        name = file.relative_to(directory)
        if file in skipped or str(name) == MANIFEST or any(part.startswith(".") for part in name.parts):
            continue
        if goes_with_graph(file):
            yield check_inside(file, directory), name
        else:
            left_out.append(str(name))
    if left_out:
        names = ", ".join(left_out[:9])
        log.warning("%s: left out, since only graphs, their data and text files are copied: %s", directory, names)


# -- what is recognised ----------------------------------------------------------------------------------------


def describe_graph(path: Path) -> dict[str, Any]:
    """Describe a graph file: what is recognised in it, which layers can be rewritten, and what reads prompts slowly.

    Raises:
        NblError: there is no graph, the graph is not whole, or it is no decoder with caches.
    """
    check_graph_place(path)
    file = find_graph(path)
    model = load_graph(file)
    graph = model.graph
    layers = []
    first = None
    for layer, (pasts, _) in graph_caches(graph).items():
        found: dict[str, Any] = {"layer": layer, "caches": [str(v.name) for v in pasts], "taps": [], "reason": None}
        try:
            block = find_block(graph, layer)
            found["taps"] = ["residual", *(["normed"] if block.normed is not None else [])]
            first = first or block
        except RefusalError as error:
            found["reason"] = error.reason
        layers.append(found)
    on_cpu = providers_of(config_dir_of(file)) <= {"cpu"}
    return {
        "graph": str(file),
        "bytes": file.stat().st_size + sum(data.stat().st_size for data in data_files(file, model)),
        **decoder_facts(graph, first, config_dir_of(file)),
        "logits": logits_of(graph),
        "replaced_layers": replaced_layers(graph),
        "layers": layers,
        "findings": [asdict(finding) for finding in find_slow(graph, on_cpu=on_cpu)],
    }


def decoder_facts(graph: ir.Graph, block: AttentionBlock | None, directory: Path) -> dict[str, Any]:
    """Number of layers and hidden size; the latter is None if the graph does not state it.

    Args:
        block: any; None if none is understood.
        directory: may hold config.json and genai_config.json, which know of layers without a cache behind the last.
    """
    layers = max([*graph_caches(graph), (_stated_layers(directory) or 0) - 1]) + 1
    return {"num_layers": layers, "hidden_size": None if block is None else _hidden_size(block)}


def _stated_layers(directory: Path) -> int | None:
    """The number of layers by config.json, or else by genai_config.json."""
    places = (("config.json", ()), (GENAI_CONFIG, ("model", "decoder")))
    for name, parts in places:
        try:
            value: Any = read_json(directory / name)
        except (OSError, ValueError):
            continue
        for part in (*parts, "num_hidden_layers"):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _hidden_size(block: AttentionBlock) -> int | None:
    """Width of the residual stream: the input width of the first products, else a stated dimension, else None."""
    for value in block.projected:
        for node in value.consumers():
            width = _input_width(node)
            if width is not None:
                return width
    return _dimension(block.residual, 2)


def _input_width(node: ir.Node) -> int | None:
    """Of a product, from its weight."""
    if node.op_type not in PRODUCTS:
        return None
    if node.op_type in _QUANTISES:
        return next((w for user in node.outputs[0].consumers() if (w := _input_width(user)) is not None), None)
    if "K" in node.attributes:
        return node.attributes["K"].as_int()
    weight = next((v for v in node.inputs[1:2] if v is not None and is_constant(v)), None)
    shape = None if weight is None else _shape_of(weight)
    if shape is None or len(shape) != 2:
        return None
    flipped = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
    return shape[1] if flipped else shape[0]


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


def _dimension(value: ir.Value, index: int) -> int | None:
    shape = value.shape
    dim = None if shape is None or len(shape) <= index else shape[index]
    if isinstance(dim, ir.SymbolicDim) and (dim.value or "").isdecimal():
        return int(str(dim.value))  # torch.export names a dimension of size 16 "16"
    return dim if isinstance(dim, int) else None


def logits_of(graph: ir.Graph) -> str | None:
    """Which logits the graph gives, "last" or "all"; None if no output is named logits."""
    value = next((v for v in graph.outputs if v.name == "logits"), None)
    return None if value is None else "last" if _dimension(value, 1) == 1 else "all"


def replaced_layers(graph: ir.Graph) -> list[int]:
    """Layers whose attention a map has replaced, by the names of their constants."""
    found = (re.match(r"nbl\.layers\.(\d{1,9})\.", name) for name in graph.initializers)
    return sorted({int(match[1]) for match in found if match})
