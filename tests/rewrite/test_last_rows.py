"""The last positions' logits: those of the whole graph, zeros in front, and the old shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.linear import Linear
from nbl_export.records.plan import Plan
from nbl_export.rewrite import rewrite_model
from nbl_export.rewrite.tail import PruneTail

from ..tiny import ARCHITECTURES, HEAD_DIM, LAYERS, VOCAB

ROWS = 5
GRAPHS = [(a, s, "fp32") for a in ARCHITECTURES for s in ("genai", "mobius")]
TOLERANCE = {"fp32": 2e-4, "int8": 0.05, "int4": 0.05, "fp16": 0.02}


@pytest.mark.parametrize("replaced", [(), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize(
    ("architecture", "source", "precision"),
    [*GRAPHS, ("llama", "genai", "int8"), ("llama", "genai", "int4"), ("llama", "mobius", "fp16")],
)
def test_chunks_of_every_length(
    architecture: str, source: str, precision: str, replaced: tuple[int, ...], exported: Callable[..., Path],
    random_maps: Callable[..., dict[int, Linear]], tmp_path: Path,
) -> None:  # fmt: skip
    """Longer than the computed positions, as long, shorter, and single tokens, each behind the ones before."""
    directory = exported(architecture, source, precision)
    model = ir.load(directory / "model.onnx")
    rewrite_model(model, Plan(LAYERS, replaced), random_maps(*replaced))
    for name, rows in (("every", None), ("last", ROWS)):
        if rows is not None:
            assert PruneTail(rows)(model).modified
        (tmp_path / name).mkdir()
        ir.save(model, tmp_path / name / "model.onnx", external_data="model.onnx.data")
    every, last = (OnnxDecoder(tmp_path / name, HEAD_DIM) for name in ("every", "last"))
    assert last.contract == every.contract
    ids = np.random.default_rng(3).integers(2, VOCAB, (1, 40))
    every.begin(1)
    last.begin(1)
    start = 0
    for count in (13, ROWS, ROWS - 2, 1, ROWS + 1, 1):
        chunk = ids[:, start : start + count]
        start += count
        right, found = every.step(chunk)[0], last.step(chunk)[0]
        computed = min(count, ROWS)
        assert found.shape == right.shape
        assert not found[:-computed].any()
        np.testing.assert_allclose(found[-computed:], right[-computed:], atol=TOLERANCE[precision], rtol=0)


def test_the_last_layer_computes_few_positions(exported: Callable[..., Path]) -> None:
    """The gather stands in front of the last layer's output projection, and the head has no other input."""
    model = ir.load(exported("llama") / "model.onnx")
    PruneTail(ROWS)(model)
    slices = [node for node in model.graph if node.op_type == "Slice" and str(node.name).startswith("/nbl/rows")]
    assert len(slices) == 2
    users = [user.op_type for node in slices for user, _ in node.outputs[0].uses()]
    assert "MatMul" in users
    (logits,) = (v for v in model.graph.outputs if v.name == "logits")
    assert logits.producer().op_type == "Pad"  # type: ignore[union-attr]
