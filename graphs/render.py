"""Golden text of tiny decoders before and after the rewrite, with their contracts.

    python graphs/render.py        writes graphs/{architecture}-{source}-{original|nbl|predicted-kv}.txt
    tests/test_graphs.py           compares, and shows what changed

`nbl` has a linear layer. `predicted-kv` has an exit layer at layer 1 and 3 recent tokens. The text is for review:
inputs, outputs, then one line for each node. Lines of a branch are indented. Initializers appear with name, element
type and shape, and with their value if the rewrite added a few integers. The parity tests check all other values.
"""

from __future__ import annotations

import importlib.metadata as metadata
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import onnx_ir as ir

from nbl_export.graph.ir.anatomy import states_of
from nbl_export.graph.ir.files import ordered, read_ir
from nbl_export.graph.names import GRAPH_FILE, STATIC_GRAPH_FILE
from nbl_export.graph.rowwise import DOMAIN
from nbl_export.methods.base import Mixer
from nbl_export.methods.rewrite import rewrite_model
from nbl_export.records.decoder import TensorInfo
from nbl_export.targets import exporter_of
from tests.contracts import contract_of
from tests.exits import predicted_maps
from tests.exports import build_decoder
from tests.tiny import ARCHITECTURES, HEAD_DIM, KV_HEADS, made_by, random_map, save_checkpoint

__all__ = ["CASES", "HERE", "export_case", "file_names", "header", "render_all", "render_case", "render_graph"]

Case = tuple[str, str, str]  # architecture, decoder source, precision

HERE = Path(__file__).parent
REPLACED = (1,)
MAPS = {i: random_map(i) for i in REPLACED}
RENDERED = ("qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "smollm3", "granite")  # beside ARCHITECTURES
CASES: tuple[Case, ...] = (
    *((a, s, "fp32") for a in ARCHITECTURES for s in ("genai", "mobius")),
    *((a, s, "fp32") for s in ("genai", "mobius") for a in made_by(s) if a in RENDERED),
    ("llama", "genai", "int8"),
    ("llama", "genai", "int4"),
    ("llama", "mobius", "fp16"),
    ("mistral-window", "static", "fp32"),
    ("llama", "static", "fp16"),
    ("llama", "openvino", "fp32"),
    ("llama", "openvino", "int4"),
    ("gemma3", "openvino", "fp32"),
)
# Those of CASES that have predicted KV too: joined and separate products of attention, norms of keys and windows, int8,
# and the static form.
PREDICTED: tuple[Case, ...] = (
    ("llama", "genai", "fp32"),
    ("qwen2", "genai", "fp32"),
    ("gemma3", "genai", "fp32"),
    ("llama", "genai", "int8"),
    ("llama", "static", "fp16"),
)
PREDICTED_MAPS = predicted_maps(1, 3, KV_HEADS * HEAD_DIM)
_EXPORTER = {"genai": "onnxruntime-genai", "mobius": "mobius-onnx", "static": "mobius-onnx", "openvino": "openvino"}
_FILE = {"genai": GRAPH_FILE, "mobius": GRAPH_FILE, "static": STATIC_GRAPH_FILE}
_SLOTS = 96  # of a cache of the static form


def header(source: str) -> str:
    """First line of a golden file: the versions of exporter and graph library."""
    if source == "openvino":
        return f"# openvino {metadata.version('openvino')}, nncf {metadata.version('nncf')}"
    return f"# {_EXPORTER[source]} {metadata.version(_EXPORTER[source])}, onnx-ir {metadata.version('onnx-ir')}"


def render_graph(model: ir.Model) -> str:
    """The graph as text."""
    contract = contract_of(model)
    lines = [f"opsets {dict(sorted(model.opset_imports.items()))}, caches of layers {list(contract.cache_layers)}"]
    lines += [f"input  {_info(i)}" for i in contract.inputs] + [f"output {_info(o)}" for o in contract.outputs]
    for function in (f for f in model.functions.values() if f.domain == DOMAIN):
        inputs, outputs = (", ".join(map(_value, values)) for values in (function.inputs, function.outputs))
        lines += [f"function {function.domain}.{function.name}({inputs}) -> {outputs}"]
        lines += [f"    {line}" for line in _node_lines(function.graph)]
    return "\n".join([*lines, *_node_lines(model.graph)]) + "\n"


def _node_lines(graph: ir.Graph) -> Iterator[str]:
    for node in graph:
        branches = {k: a.as_graph() for k, a in node.attributes.items() if a.type == ir.AttributeType.GRAPH}
        settings = {k: a for k, a in node.attributes.items() if k not in branches}
        attributes = ", ".join(f"{k}={_attribute(a)}" for k, a in sorted(settings.items()))
        inputs = ", ".join(_value(v) for v in node.inputs)
        outputs = ", ".join(v.name or "-" for v in node.outputs)
        yield f"{node.op_type}({inputs}) -> {outputs}" + (f"  [{attributes}]" if attributes else "")
        for name, branch in branches.items():
            yield f"  {name} -> {', '.join(map(_value, branch.outputs))}"
            yield from (f"    {line}" for line in _node_lines(branch))


def render_ir(model: Any) -> str:
    """An IR as text: states, inputs, outputs, then one line for each node, numbered in the order of the dataflow."""
    states = [state for pair in states_of(model).values() for state in pair]
    lines = [f"state  {s.variable}: {list(map(str, s.read.get_output_partial_shape(0)))}" for s in states]
    for kind, ports in (("input ", model.inputs), ("output", model.outputs)):
        lines += [f"{kind} {p.get_any_name()}: {_port(p)}" for p in ports]
    nodes = [node for node in ordered(model) if node.get_type_name() not in ("Constant", "Parameter")]
    names = {node.get_name(): f"n{k}" for k, node in enumerate(nodes)}
    for node in nodes:
        inputs = ", ".join(_source(value, names) for value in node.input_values())
        attributes = ", ".join(f"{k}={v}" for k, v in sorted(node.get_attributes().items()))
        outputs = ", ".join(_port(port) for port in node.outputs())
        kind = node.get_type_name()
        lines.append(f"{names[node.get_name()]} {kind}({inputs}) -> {outputs}" + f"  [{attributes}]" * bool(attributes))
    return "\n".join(lines) + "\n"


def _source(value: Any, names: dict[str, str]) -> str:
    node = value.get_node()
    if node.get_type_name() == "Parameter":
        return str(value.get_any_name())
    if node.get_type_name() != "Constant":
        return names[node.get_name()] + (f".{value.get_index()}" if value.get_index() else "")
    small = np.prod(node.get_output_shape(0)) <= 4 and value.get_element_type().to_string() not in ("u4", "i4")
    return f"<{_port(value)}" + (f" = {np.round(node.get_data(), 6).tolist()}>" if small else ">")


def _port(port: Any) -> str:
    return f"{port.get_element_type().to_string()}{port.get_partial_shape()}"


def _info(info: TensorInfo) -> str:
    return f"{info.name}: {info.dtype}{list(info.shape)}"


def _value(value: ir.Value | None) -> str:
    if value is None:
        return "-"
    if value.is_initializer():
        kind = value.dtype.name if value.dtype is not None else "?"
        return f"{value.name}<{kind}{list(value.shape or ())}{_numbers(value)}>"
    return str(value.name)


def _numbers(value: ir.Value) -> str:
    """The value of a few integers that the rewrite added."""
    held = value.const_value
    if held is None or not str(value.name).startswith("nbl.") or held.dtype != ir.DataType.INT64 or held.size > 8:
        return ""
    return f" = {held.numpy().tolist()}"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return str(attribute.as_tensor().numpy().tolist())
    return str(round(attribute.value, 9) if isinstance(attribute.value, float) else attribute.value)


def export_case(case: Case, scratch: Path) -> Path:
    """The original decoder of a case."""
    architecture, source, precision = case
    out, checkpoint = scratch / "-".join(case), scratch / architecture
    if not checkpoint.exists():
        save_checkpoint(architecture, checkpoint)
    build_decoder(source, checkpoint, out, precision, cache_length=_SLOTS)
    return out


def file_names(case: Case) -> list[str]:
    """Names of the golden files of a case."""
    stem = "-".join(case).removesuffix("-fp32")
    kinds = ("original", "nbl", "predicted-kv") if case in PREDICTED else ("original", "nbl")
    return [f"{stem}-{kind}.txt" for kind in kinds]


def render_case(case: Case, original: Path, scratch: Path) -> dict[str, str]:
    """File name -> text, for a case before and after the rewrite."""
    source = case[1]
    names = file_names(case)
    if source == "openvino":
        nbl = scratch / names[1]
        exporter_of(source).linearize(original, nbl, MAPS)
        texts = [render_ir(read_ir(directory)) for directory in (original, nbl)]
    else:
        every = ({}, MAPS, PREDICTED_MAPS) if case in PREDICTED else ({}, MAPS)
        texts = [render_graph(_rewritten(original / _FILE[source], maps)) for maps in every]
    return {name: f"{header(source)}\n{text}" for name, text in zip(names, texts, strict=True)}


def _rewritten(file: Path, maps: Mapping[int, Mixer]) -> ir.Model:
    model = ir.load(file)
    rewrite_model(model, maps)
    return model


def render_all() -> dict[str, str]:
    """File name -> text, for every case before and after the rewrite."""
    files: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            files |= render_case(case, export_case(case, Path(name)), Path(name))
    return files


if __name__ == "__main__":
    for old in HERE.glob("*.txt"):
        old.unlink()
    for name, text in render_all().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(name)
