"""Tail pruning: the last valid token's logits, whatever the padding, chunk or cache; refused where it is not legal."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.rewrite import rewrite_model
from nbl_export.rewrite.tail import PruneTail

from ..tiny import ARCHITECTURES, HEAD_DIM, HIDDEN, VOCAB

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
GRAPHS = [(a, s) for a in ARCHITECTURES for s in ("genai", "mobius")]
TOLERANCE = 2e-4


def pruned(source: Path, replaced: tuple[int, ...], maps: dict[int, Linear], out: Path) -> OnnxDecoder:
    model = ir.load(source / "model.onnx")
    rewrite_model(model, maps)
    assert PruneTail()(model).modified
    out.mkdir()
    ir.save(model, out / "model.onnx", external_data="model.onnx.data")
    return OnnxDecoder(out, HEAD_DIM)


def reference(checkpoint: Path, maps: dict[int, Linear], row: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits = linearize(load_model(checkpoint), maps)(torch.from_numpy(row)[None], use_cache=False).logits
    found: np.ndarray = logits[0].numpy()
    return found


@pytest.mark.parametrize("replaced", [(), (2,), (1, 2), (0, 1)], ids=str)
@pytest.mark.parametrize(
    ("architecture", "source"), [("llama", "genai"), ("llama", "mobius"), ("mistral-window", "genai")]
)
def test_chunk_after_a_cache_then_decode(
    architecture: str, source: str, replaced: tuple[int, ...], checkpoint: Any, exported: Exported, random_maps: Maps,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A chunk of 7 after a cache of 13, then single tokens."""
    ids = np.random.default_rng(1).integers(2, VOCAB, 24)
    maps = random_maps(*replaced)
    decoder = pruned(exported(architecture, source), replaced, maps, tmp_path / "out")
    expected = reference(checkpoint(architecture), maps, ids)
    decoder.begin(1)
    place = 0
    for size in (13, 7, 1, 1, 1, 1):
        logits = decoder.step(ids[None, place : place + size])
        place += size
        assert logits.shape == (1, 1, VOCAB)
        np.testing.assert_allclose(logits[0, 0], expected[place - 1], atol=TOLERANCE)


LENGTHS = (1, 5, 12)


def padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """The first tokens of each row as one batch, and 1 where a token is valid."""
    ids, valid = np.zeros((2, len(rows), max(LENGTHS)), np.int64)
    for b, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        where = slice(None, n) if side == "right" else slice(max(LENGTHS) - n, None)
        ids[b, where], valid[b, where] = row[:n], 1
    return ids, valid


@pytest.mark.parametrize("source", ["genai", "mobius"])
def test_rows_padded_on_the_right(
    source: str, checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """Lengths 1, 5 and 12, then two cached steps: what the fused attention operator takes."""
    rng = np.random.default_rng(2)
    maps = random_maps(2)
    decoder = pruned(exported("llama", source), (2,), maps, tmp_path / "out")
    rows = [rng.integers(2, VOCAB, n + 2) for n in LENGTHS]
    decoder.begin(3)
    steps = [decoder.step(*padded(rows, "right"))] + [
        decoder.step(np.array([[row[n + k]] for row, n in zip(rows, LENGTHS, strict=True)])) for k in range(2)
    ]
    for b, (row, n) in enumerate(zip(rows, LENGTHS, strict=True)):
        expected = reference(checkpoint("llama"), maps, row)
        for k, logits in enumerate(steps):
            np.testing.assert_allclose(logits[b, 0], expected[n - 1 + k], atol=TOLERANCE)


def test_rows_padded_on_the_left(checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """What only a graph of plain attention takes: mobius in fp16, with position ids that skip the padding."""
    rng = np.random.default_rng(2)
    maps = random_maps(2)
    decoder = pruned(exported("llama", "mobius", "fp16"), (2,), maps, tmp_path / "out")
    rows = [rng.integers(2, VOCAB, n) for n in LENGTHS]
    ids, valid = padded(rows, "left")
    decoder.begin(3)
    feeds = {"input_ids": ids, "attention_mask": valid, "position_ids": np.maximum(valid.cumsum(1) - 1, 0)}
    (logits,) = decoder.session.run(["logits"], {**feeds, **decoder._past})
    for b, row in enumerate(rows):
        expected = reference(checkpoint("llama"), maps, row)[-1]
        np.testing.assert_allclose(logits[b, 0].astype(np.float32), expected, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantised_graph_is_pruned_too(precision: str, exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """Same logits as the unpruned quantised graph gives for the last position."""
    source, maps = exported("llama", "genai", precision), random_maps(2)
    model = ir.load(source / "model.onnx")
    rewrite_model(model, maps)
    (tmp_path / "all").mkdir()
    ir.save(model, tmp_path / "all" / "model.onnx", external_data="model.onnx.data")
    whole = OnnxDecoder(tmp_path / "all", HEAD_DIM)
    last = pruned(source, (2,), maps, tmp_path / "last")
    ids = np.random.default_rng(3).integers(2, VOCAB, (1, 20))
    whole.begin(1)
    last.begin(1)
    expected = whole.step(ids)[0, -1]
    np.testing.assert_allclose(last.step(ids)[0, 0], expected, atol=0.02 * np.abs(expected).max())


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


def test_refuses_another_output_of_all_positions(exported: Exported) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    hidden = next(n for n in model.graph if n.name == "/lm_head/MatMul").inputs[0]
    assert hidden is not None
    model.graph.outputs.append(hidden)
    with pytest.raises(RefusalError, match="is an output behind the last attention"):
        PruneTail()(model)


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


def test_runs_in_the_generation_runtime(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """ONNX Runtime GenAI generates the same text with and without the pruned tail."""
    from nbl_export.rewrite import rewrite
    from nbl_export.targets.onnx.engine import ORT

    rewrite(exported("llama"), tmp_path / "all", random_maps(1, 2))
    shutil.copytree(tmp_path / "all", tmp_path / "last")
    model = ir.load(tmp_path / "all" / "model.onnx")
    PruneTail()(model)
    ir.save(model, tmp_path / "last" / "model.onnx", external_data="model.onnx.data")
    said = []
    for name in ("all", "last"):
        with ORT.open_runner(tmp_path / name) as runner:
            said.append(runner.greedy(list(range(5, 30)), 12))
    assert said[0] == said[1]
