"""Makes the products of an int8 decoder those of `graph.rowwise`, balanced by moments of a text.

DIR/model.onnx ─► run on rows of the text ─► E[x_k^2] of each product's input ─► DIR/model.onnx
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.emitter import run_passes
from nbl_export.graph.files import read_graph, save_graph
from nbl_export.graph.genai_config import read_genai_config
from nbl_export.graph.names import GENAI_CONFIG, GRAPH_FILE
from nbl_export.graph.passes.rowwise import MakeRowwise, moment_outputs
from nbl_export.graph.rowwise import session_entries
from nbl_export.graph.session import open_session
from nbl_export.graph.trust import read_proto

__all__ = ["round_rows"]

_LOGITS = "logits"


def round_rows(directory: Path, rows_BT: npt.NDArray[np.int64] | None) -> None:
    """Convert the products of a GenAI directory in place.

    Args:
        rows_BT: token ids of the text that balances the channels; each row is read alone. None: no balance.
    """
    moments = {} if rows_BT is None else _moments(directory, rows_BT)
    model = read_graph(directory / GRAPH_FILE)
    run_passes([MakeRowwise(moments)], model)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        save_graph(model, Path(scratch) / GRAPH_FILE)
        for file in sorted(Path(scratch).iterdir(), reverse=True):  # the data before the graph that reads it
            file.replace(directory / file.name)
    settings = read_genai_config(directory)
    entries = session_entries(read_proto(directory / GRAPH_FILE))
    settings["model"]["decoder"].setdefault("session_options", {}).update(entries)
    (directory / GENAI_CONFIG).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _moments(directory: Path, rows_BT: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """Sum of squares of each channel, by the name of a product's input."""
    model = read_graph(directory / GRAPH_FILE)
    graph = model.graph
    names = moment_outputs(model)
    graph.outputs[:] = [value for value in graph.outputs if value.name != _LOGITS]  # ONNX Runtime leaves out the head
    session = open_session(ir.to_proto(model).SerializeToString(), folder=directory)
    head_dim = read_genai_config(directory)["model"]["decoder"]["head_size"]
    decoder = OnnxDecoder(directory, head_dim, session=session)
    totals: dict[str, npt.NDArray[np.float64]] = {}
    for row in rows_BT:
        decoder.begin(1)
        found = decoder.run(row[None])
        for output, name in names.items():
            totals[name] = totals.get(name, 0) + found[output].astype(np.float64)
    return totals
