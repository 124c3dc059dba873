"""Maps fitted on moments of a decoder graph beside maps fitted on moments of its torch model, layer by layer.

    python bench/onnx_moments.py CHECKPOINT GRAPH.onnx [--tokens 4096] > bench/results/onnx-moments-<model>.json

Both see the same windows of the default text. A difference is relative: of a matrix to the largest entry of torch's,
of bound and calibration error (NMSE) to torch's figure.
"""

from __future__ import annotations

import argparse
import importlib.metadata as metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export import calibrate, corpus, lmmse, mixture
from nbl_export.checkpoint import load_model, load_tokenizer
from nbl_export.graph_moments import GraphCollection
from nbl_export.graph_source import read_spec
from nbl_export.records import TAPS

CONTEXT = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    text = mixture.read_texts(())
    windows, _ = corpus.pack(text, load_tokenizer(asked.checkpoint), asked.tokens, CONTEXT)
    ours = from_graph(asked.graph, windows)
    theirs = calibrate.collect(load_model(asked.checkpoint), windows, lambda _d, _t: None, TAPS)
    rows = [compare(tap, i, a, b) for tap in TAPS for i, (a, b) in enumerate(zip(ours[tap], theirs[tap], strict=True))]
    worst = {name: max(row[name] for row in rows) for name in rows[0] if name.endswith("difference")}
    print(
        json.dumps(
            {
                "command": "python bench/onnx_moments.py CHECKPOINT GRAPH.onnx",
                "graph": asked.graph.name,
                "text": text.name,
                "tokens": int(windows.numel()),
                "context": CONTEXT,
                "versions": {n: metadata.version(n) for n in ("torch", "transformers", "onnxruntime", "onnx-ir")},
                "worst": worst,
                "layers": rows,
            },
            indent=1,
        )
    )


def from_graph(graph: Path, windows: torch.Tensor) -> dict[str, list[lmmse.Moments]]:
    with GraphCollection(graph, read_spec(graph), TAPS) as found:
        found.refer(windows)
        for k, batch in enumerate(calibrate.batches(windows)):
            found.add(batch)
            print(f"batch {k}", file=sys.stderr)
        layers = [found.layer(i) for i in range(found.num_layers)]
    return {tap: [sums[tap].moments() for sums in layers] for tap in TAPS}


def compare(tap: str, layer: int, graph: lmmse.Moments, own: lmmse.Moments) -> dict[str, Any]:
    one, other = lmmse.fit(graph, layer), lmmse.fit(own, layer)
    scores = [lmmse.score(moments, layer) for moments in (graph, own)]
    return {
        "tap": tap,
        "layer": layer,
        "xx_difference": relative(graph.xx.numpy(), own.xx.numpy()),
        "yx_difference": relative(graph.yx.numpy(), own.yx.numpy()),
        "weight_difference": relative(one.weight, other.weight),
        "bias_difference": relative(one.bias, other.bias),
        "bound_difference": abs(scores[0].bound - scores[1].bound) / abs(scores[1].bound),
        "nmse_difference": abs(scores[0].nmse - scores[1].nmse) / abs(scores[1].nmse),
    }


def relative(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


if __name__ == "__main__":
    main()
