"""Copies a model folder into the layout of transformers.js: python bench/runtimes/layout.py DIR/model OUT

    model.onnx, model.onnx.data              onnx/model.onnx, onnx/model.onnx_data   (model_q4.onnx at int4, ...)
    config.json                              with transformers.js_config: dtype, and that there is a data file
    tokenizer_config.json, its template      tokenizer_config.json holds the template

transformers.js (4.3) makes empty caches from the shapes of the graph's inputs and counts a symbolic dimension as 0. So
the head size becomes a number. A browser holds about 2 GB in one file; a larger model needs Node.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import onnx

__all__ = ["lay_out"]

DTYPES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}


def lay_out(model: Path, out: Path) -> Path:
    """Copy the model folder of a run for ONNX Runtime to `out`, which must be new."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("model.onnx*", "all_logits.onnx"))
    config, genai, tokenizer, run = (
        json.loads((model / name).read_text(encoding="utf-8"))
        for name in ("config.json", "genai_config.json", "tokenizer_config.json", "nbl.json")
    )
    dtype, suffix = DTYPES[run["options"]["precision"]]
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    for value in (*graph.graph.input, *graph.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = genai["model"]["decoder"]["head_size"]
    for entry in (e for tensor in graph.graph.initializer for e in tensor.external_data if e.key == "location"):
        entry.value = f"model{suffix}.onnx_data"
    (out / "onnx").mkdir()
    onnx.save(graph, out / "onnx" / f"model{suffix}.onnx")
    shutil.copyfile(model / "model.onnx.data", out / "onnx" / f"model{suffix}.onnx_data")
    config["transformers.js_config"] = {"dtype": dtype, "use_external_data_format": 1}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if (template := model / "chat_template.jinja").is_file():
        tokenizer["chat_template"] = template.read_text(encoding="utf-8")
        (out / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return out


if __name__ == "__main__":
    print(lay_out(Path(sys.argv[1]), Path(sys.argv[2])))
