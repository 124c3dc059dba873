"""States of layers without attention, in graphs of the GenAI builder and of mobius: names, padding, settings."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir

from nbl_export.graph.files import read_graph
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.rewrite.states import MaskStates, TextPositions

__all__ = ["adopt_states"]

_OF_STATES = ("layer_types", "conv_cache_size")  # of the decoder in genai_config.json
_ANY_DECODER = "llama"  # a type in which GenAI finds states by their names


def adopt_states(out: Path) -> None:
    """Give states of layers without attention the names and the form of this package (`rewrite.states`)."""
    model = read_graph(out / GRAPH_FILE)
    if not any([MaskStates()(model).modified, TextPositions()(model).modified]):
        return
    ir.save(model, out / GRAPH_FILE)
    settings = json.loads((out / GENAI_CONFIG).read_text(encoding="utf-8"))
    decoder = settings["model"]["decoder"]
    settings["model"]["type"] = _ANY_DECODER
    settings["model"]["decoder"] = {key: value for key, value in decoder.items() if key not in _OF_STATES}
    for names in (decoder["inputs"], decoder["outputs"]):
        for name in [key for key in names if "_conv_" in key or "_recurrent_" in key]:
            del names[name]
    (out / GENAI_CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
