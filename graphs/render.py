"""Golden text of tiny decoders before and after the rewrite, with their contracts.

    python graphs/render.py        writes graphs/{architecture}-{source}-{original|nbl}.txt
    tests/test_graphs.py           compares, and shows what changed

The text is for review: inputs, outputs, then one line for each node. Initializers appear with name, element type and
shape; the parity tests check their values.
"""

from __future__ import annotations

import importlib.metadata as metadata
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import onnx_ir as ir

from nbl_export.decoders import build_decoder
from nbl_export.graph.names import GRAPH_FILE, STATIC_GRAPH_FILE
from nbl_export.records.decoder import TensorInfo
from nbl_export.records.plan import Plan
from nbl_export.rewrite import contract_of, rewrite_model
from tests.tiny import ARCHITECTURES, LAYERS, made_by, random_map, save_checkpoint

__all__ = ["CASES", "HERE", "header", "render_all", "render_graph"]

HERE = Path(__file__).parent
REPLACED = (1,)
# (architecture, decoder source, precision)
CASES = (
    *((a, s, "fp32") for a in ARCHITECTURES for s in ("genai", "mobius")),
    *((a, s, "fp32") for s in ("genai", "mobius") for a in made_by(s) if a not in ARCHITECTURES),
    ("llama", "genai", "int4"),
    ("llama", "mobius", "fp16"),
    ("mistral-window", "static", "fp32"),
    ("llama", "static", "fp16"),
)
_EXPORTER = {"genai": "onnxruntime-genai", "mobius": "mobius-onnx", "static": "mobius-onnx"}
_FILE = {"genai": GRAPH_FILE, "mobius": GRAPH_FILE, "static": STATIC_GRAPH_FILE}
_SLOTS = 96  # of a cache of the static form


def header(source: str) -> str:
    """First line of a golden file: the versions of exporter and onnx-ir."""
    return f"# {_EXPORTER[source]} {metadata.version(_EXPORTER[source])}, onnx-ir {metadata.version('onnx-ir')}"


def render_graph(model: ir.Model) -> str:
    """The graph as text."""
    contract = contract_of(model)
    lines = [f"opsets {dict(sorted(model.opset_imports.items()))}, caches of layers {list(contract.cache_layers)}"]
    lines += [f"input  {_info(i)}" for i in contract.inputs] + [f"output {_info(o)}" for o in contract.outputs]
    for node in model.graph:
        attributes = ", ".join(f"{k}={_attribute(a)}" for k, a in sorted(node.attributes.items()))
        inputs = ", ".join(_value(v) for v in node.inputs)
        outputs = ", ".join(v.name or "-" for v in node.outputs)
        lines.append(f"{node.op_type}({inputs}) -> {outputs}" + (f"  [{attributes}]" if attributes else ""))
    return "\n".join(lines) + "\n"


def _info(info: TensorInfo) -> str:
    return f"{info.name}: {info.dtype}{list(info.shape)}"


def _value(value: ir.Value | None) -> str:
    if value is None:
        return "-"
    if value.is_initializer():
        return f"{value.name}<{value.dtype.name if value.dtype is not None else '?'}{list(value.shape or ())}>"
    return str(value.name)


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return str(attribute.as_tensor().numpy().tolist())
    return str(round(attribute.value, 9) if isinstance(attribute.value, float) else attribute.value)


def render_all() -> dict[str, str]:
    """File name -> text, for every case before and after the rewrite."""
    files = {}
    with tempfile.TemporaryDirectory() as scratch:
        for architecture, source, precision in CASES:
            checkpoint = Path(scratch) / architecture
            if not checkpoint.exists():
                save_checkpoint(architecture, checkpoint)
            out = Path(scratch) / f"{architecture}-{source}-{precision}"
            build_decoder(source, checkpoint, out, precision, slots=_SLOTS)
            model = ir.load(out / _FILE[source])
            stem = f"{architecture}-{source}" + ("" if precision == "fp32" else f"-{precision}")
            files[f"{stem}-original.txt"] = f"{header(source)}\n{render_graph(model)}"
            rewrite_model(model, Plan(LAYERS, REPLACED), {i: random_map(i) for i in REPLACED})
            files[f"{stem}-nbl.txt"] = f"{header(source)}\n{render_graph(model)}"
    return files


if __name__ == "__main__":
    for old in HERE.glob("*.txt"):
        old.unlink()
    for name, text in render_all().items():
        (HERE / name).write_text(text, encoding="utf-8")
        print(name)
