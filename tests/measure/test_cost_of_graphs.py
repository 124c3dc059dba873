"""The cost model against what ONNX Runtime really runs, counted node by node."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.names import all_logits_file
from nbl_export.graph.passes.tail import keep_last_token
from nbl_export.measure.cost import WEIGHT_BYTES, CostModel, LayerSizes, Work
from nbl_export.methods.base import TokenWork
from nbl_export.methods.checkpoint.shape import read_shape
from nbl_export.methods.rewrite import rewrite
from nbl_export.methods.rows import Read
from nbl_export.records.decoder import DecoderSpec
from nbl_export.targets import exporter_of
from nbl_export.targets.base import ExportSettings

from ..tiny import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCAB

SPEC = DecoderSpec("llama", LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, 512)


class Count:
    """Runs a graph with profiling on and adds up the work of the nodes that ran."""

    def __init__(self, directory: Path, file: str, scratch: Path) -> None:
        self.graph = onnx.load(str(directory / file), load_external_data=False).graph
        self.decoder = OnnxDecoder(directory, HEAD_DIM, file=file)
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.decoder.session = onnxruntime.InferenceSession(str(directory / file), options)

    def run(self, tokens: int, depth: int) -> Work:
        """Work of a chunk of tokens after so many."""
        self.decoder.begin(1)
        for chunk in [depth] if depth else []:
            self.decoder.step(np.full((1, chunk), 5))
        self.decoder.step(np.full((1, tokens), 5))
        events = json.loads(Path(self.decoder.session.end_profiling()).read_text(encoding="utf-8"))
        last = max(e["ts"] for e in events if e.get("name") == "model_run")
        ran = [e["args"] for e in events if e.get("cat") == "Node" and "op_name" in e["args"] and e["ts"] >= last]
        flops = sum(self._flops(args, tokens, depth) for args in ran)
        return Work(flops, self._weight_bytes() + self.decoder.cache_bytes)

    def _flops(self, args: dict[str, Any], tokens: int, depth: int) -> float:
        shapes = [next(iter(entry.values())) for entry in args["input_type_shape"]]
        given = [next(iter(entry.values())) for entry in args["output_type_shape"]]
        if args["op_name"] in ("MatMul", "MatMulNBits"):
            return 2.0 * math.prod(given[0]) * shapes[0][-1]
        if args["op_name"] == "GroupQueryAttention":
            assert given[0] == [1, tokens, SPEC.num_heads * HEAD_DIM]
            pairs = sum(depth + i + 1 for i in range(tokens))
            return 4.0 * SPEC.num_heads * HEAD_DIM * pairs
        return 0.0

    def _weight_bytes(self) -> int:
        sizes = {t.name: math.prod(t.dims) * {1: 4, 2: 1}[t.data_type]
                 for t in self.graph.initializer if t.data_type in (1, 2)}  # fmt: skip
        made = {name: node for node in self.graph.node for name in node.output}
        total = 0
        for node in self.graph.node:
            if node.op_type in ("MatMul", "MatMulNBits"):
                names = [
                    made[n].input[0] if n in made and made[n].op_type == "Transpose" else n for n in node.input[1:]
                ]
                total += sum(sizes.get(n, 0) for n in names)
        return total


def costs_of(checkpoint: Path, precision: str, *, pruned: bool) -> CostModel:
    size = WEIGHT_BYTES[precision]
    return CostModel(
        SPEC, read_shape(checkpoint).mlp, size, size, 4, all_logits=not pruned, tail_pruned=pruned
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(("tokens", "depth"), [(9, 0), (7, 13), (1, 20)])
def test_original_graph(
    exported: Callable[..., Path], checkpoint: Callable[[str], Path], tmp_path: Path, precision: str, tokens: int,
    depth: int,
) -> None:  # fmt: skip
    """int4 and int8 as the model counts them: all matrices in blocks of 4 bits, or of 8 bits."""
    directory = exported("llama", "genai", precision) if precision == "fp32" else tmp_path / precision
    if precision != "fp32":
        settings = ExportSettings("genai", precision, 0, ("algo_config=default",))
        exporter_of("genai").export(checkpoint("llama"), directory, settings)
    found = Count(directory, "model.onnx", tmp_path).run(tokens, depth)
    assert costs_of(checkpoint("llama"), precision, pruned=False).prefill({}, tokens, depth) == found


@pytest.mark.parametrize(("tokens", "depth"), [(9, 0), (7, 13), (1, 20)])
@pytest.mark.parametrize("name", ["original", "model"])
def test_graphs_that_a_run_ships(
    exported: Callable[..., Path], random_maps: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path,
    name: str, tokens: int, depth: int,
) -> None:  # fmt: skip
    """Pruned tails, replaced layers with full maps."""
    maps = random_maps(1) if name == "model" else {}
    sizes = dict.fromkeys(maps, LayerSizes((Read(),), (TokenWork(HIDDEN * HIDDEN, HIDDEN * HIDDEN),)))
    directory = tmp_path / name
    if maps:
        rewrite(exported("llama"), directory, maps)
    else:
        shutil.copytree(exported("llama"), directory)
    keep_last_token(directory)
    for file, pruned in (("model.onnx", True), (all_logits_file(directory), False)):
        found = Count(directory, file, tmp_path).run(tokens, depth)
        assert costs_of(checkpoint("llama"), "fp32", pruned=pruned).prefill(sizes, tokens, depth) == found
