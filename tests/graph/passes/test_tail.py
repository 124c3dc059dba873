"""Tail pruning: where the gather stands, rows padded on the left, and where it is refused.

`test_last_token` has chunks, caches, batches and precisions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.passes.tail import PruneTail
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite_model
from tests.tiny import ARCHITECTURES, HEAD_DIM, HIDDEN, VOCAB

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
GRAPHS = [(a, s) for a in ARCHITECTURES for s in ("genai", "mobius")]


def pruned(source: Path, replaced: tuple[int, ...], maps: dict[int, Linear], out: Path) -> OnnxDecoder:
    model = ir.load(source / "model.onnx")
    rewrite_model(model, maps)
    assert PruneTail()(model).modified
    out.mkdir()
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    return OnnxDecoder(out, HEAD_DIM)


def test_rows_padded_on_the_left(checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """What only a graph of plain attention takes: mobius in fp16, with position ids that skip the padding."""
    rng, maps = np.random.default_rng(2), random_maps(2)
    decoder = pruned(exported("llama", "mobius", "fp16"), (2,), maps, tmp_path / "out")
    rows = [rng.integers(2, VOCAB, n) for n in (1, 5, 12)]
    ids, valid = np.zeros((2, len(rows), 12), np.int64)
    for b, row in enumerate(rows):
        ids[b, -len(row) :], valid[b, -len(row) :] = row, 1
    decoder.begin(3)
    feeds = {"input_ids": ids, "attention_mask": valid, "position_ids": np.maximum(valid.cumsum(1) - 1, 0)}
    (logits,) = decoder.session.run(["logits"], {**feeds, **decoder._past})
    model = linearize(load_model(checkpoint("llama")), maps)
    for b, row in enumerate(rows):
        with torch.inference_mode():
            expected = model(torch.from_numpy(row)[None], use_cache=False).logits[0, -1].numpy()
        np.testing.assert_allclose(logits[b, 0].astype(np.float32), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize(("architecture", "source"), GRAPHS)
def test_o_proj_runs_on_one_token(architecture: str, source: str, exported: Exported) -> None:
    """The gather stands in front of every node that works on each token by itself, o_proj's product first."""
    model = ir.load(exported(architecture, source) / "model.onnx")
    assert PruneTail()(model).modified
    user = taken(model).outputs[0].consumers()[0]
    assert user.op_type == "MatMul" and "o_proj" in str(user.inputs[1].name if user.inputs[1] else user.name)


def _second_reader(model: ir.Model, product: ir.Node) -> None:
    reader = ir.node("Identity", [product.outputs[0]], name="reader")
    model.graph.insert_after(product, reader)


def _scale_of_all_tokens(model: ir.Model, product: ir.Node) -> None:
    entering = product.inputs[0]
    assert entering is not None
    largest = ir.node("ReduceMax", [entering], attributes={"keepdims": 1}, name="largest")
    scaled = ir.node("Div", [entering, largest.outputs[0]], name="scaled")
    model.graph.insert_before(product, [largest, scaled])
    product.replace_input_with(0, scaled.outputs[0])


def _constant_for_each_token(model: ir.Model, product: ir.Node) -> None:
    offsets = ir.Value(name="offsets", const_value=ir.tensor(np.ones((1, 5, HIDDEN), np.float32), name="offsets"))
    offsets.shape = ir.Shape((1, 5, HIDDEN))
    model.graph.register_initializer(offsets)
    added = ir.node("Add", [product.inputs[0], offsets], name="added")
    model.graph.insert_before(product, added)
    product.replace_input_with(0, added.outputs[0])


@pytest.mark.parametrize(
    ("change", "behind"),
    [(_second_reader, "o_proj"), (_scale_of_all_tokens, "scaled"), (_constant_for_each_token, "added")],
)
def test_the_gather_stays_behind_what_reads_more_than_one_token(
    change: Callable[[ir.Model, ir.Node], None], behind: str, exported: Exported
) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    change(model, next(n for n in reversed(model.graph) if "o_proj" in str(n.name)))
    assert PruneTail()(model).modified
    source = taken(model).inputs[0]
    assert source is not None and behind in producer_name(source)


def producer_name(value: ir.Value) -> str:
    producer = value.producer()
    return "" if producer is None else str(producer.name)


def taken(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.name == "/nbl/tail/attention")


def test_pruning_twice_changes_nothing(exported: Exported) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    assert PruneTail()(model).modified
    assert not PruneTail()(model).modified


def test_refuses_a_tail_that_reads_the_tokens(exported: Exported) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    head = next(n for n in model.graph if n.name == "/lm_head/MatMul")
    ids = next(v for v in model.graph.inputs if v.name == "input_ids")
    cast = ir.node("Cast", [ids], attributes={"to": ir.DataType.FLOAT}, name="cast")
    spread = ir.node("Unsqueeze", [cast.outputs[0], ir.Value(name="")], name="spread")
    spread.replace_input_with(1, head.inputs[1])
    mixed = ir.node("Add", [head.inputs[0], spread.outputs[0]], name="mixed")
    model.graph.insert_before(head, [cast, spread, mixed])
    head.replace_input_with(0, mixed.outputs[0])
    with pytest.raises(RefusalError, match="mixed behind the last attention reads"):
        PruneTail()(model)
