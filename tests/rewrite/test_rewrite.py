"""Laws of the graph rewrite, on really exported tiny decoders of every architecture and source."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export import rewrite as rewriting
from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.emitter import run_passes
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model
from nbl_export.model.linearize import linearize
from nbl_export.records.plan import TAPS
from nbl_export.rewrite import rewrite, rewrite_model
from nbl_export.verify.ladder import DECODE_STEPS, run_rows

from ..contracts import contract_of
from ..tiny import ARCHITECTURES, HEAD_DIM, HIDDEN, LAYERS, VOCAB

# Largest logit difference allowed by (precision, what is compared). No other tolerance in this file.
TOLERANCE = {"fp32": 2e-4, "fp16": 0.05}
GRAPHS = [(a, s) for a in ARCHITECTURES for s in ("genai", "mobius")]
SUBSETS = [s for n in range(1, LAYERS) for s in itertools.combinations(range(LAYERS), n)]

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]


def rows(seed: int = 0) -> list[list[int]]:
    """Two rows of different length, the longer one beyond the tiny sliding window."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, VOCAB, n + DECODE_STEPS).tolist() for n in (29, 11)]


def torch_logits(checkpoint: Path, maps: dict[int, Linear], tap: str = "residual") -> list[np.ndarray]:
    model = linearize(load_model(checkpoint), maps, tap)
    with torch.inference_mode():
        return [model(torch.tensor([row]), use_cache=False).logits[0].numpy() for row in rows()]


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("replaced", SUBSETS, ids=str)
@pytest.mark.parametrize(("architecture", "source"), GRAPHS)
def test_every_subset_keeps_parity(
    architecture: str, source: str, replaced: tuple[int, ...], checkpoint: Any, exported: Exported, random_maps: Maps,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Prefill and cached steps, a batch of two lengths; cache layers and bytes as predicted."""
    maps = random_maps(*replaced)
    rewrite(exported(architecture, source), tmp_path / "nbl", maps)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    got = run_rows(decoder, rows())
    assert worst(got, torch_logits(checkpoint(architecture), maps)) < TOLERANCE["fp32"]
    kept = tuple(i for i in range(LAYERS) if i not in replaced)
    assert decoder.contract.cache_layers == kept
    assert contract_of(ir.load(tmp_path / "nbl" / "model.onnx")).cache_layers == kept
    tokens = max(map(len, rows())) * len(rows())
    assert decoder.cache_bytes == len(kept) * 2 * 2 * HEAD_DIM * 4 * tokens
    assert decoder.cache_bytes == decoder.contract.cache_bytes_per_token(HEAD_DIM) * tokens


@pytest.mark.parametrize("replaced", [(0,), (0, 2)], ids=str)
@pytest.mark.parametrize(("architecture", "source"), GRAPHS[:2])
def test_normed_tap_keeps_parity(
    architecture: str, source: str, replaced: tuple[int, ...], checkpoint: Any, exported: Exported, random_maps: Maps,
    tmp_path: Path,
) -> None:  # fmt: skip
    maps = random_maps(*replaced)
    rewrite(exported(architecture, source), tmp_path / "nbl", maps, "normed")
    got = run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows())
    assert worst(got, torch_logits(checkpoint(architecture), maps, "normed")) < TOLERANCE["fp32"]
    residual_tap = torch_logits(checkpoint(architecture), maps)
    assert worst(got, residual_tap) > 100 * TOLERANCE["fp32"]


@pytest.mark.parametrize("tap", TAPS)
def test_half_precision_graph_with_plain_attention(
    tap: str, checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path
) -> None:
    """mobius fp16 is not fused to GroupQueryAttention: masks and rotary tables are shared across layers."""
    maps = random_maps(0, 2)
    rewrite(exported("llama", "mobius", "fp16"), tmp_path / "nbl", maps, tap)
    decoder = OnnxDecoder(tmp_path / "nbl", HEAD_DIM)
    expected = torch_logits(checkpoint("llama"), maps, tap)
    scale = max(float(np.abs(e).max()) for e in expected)
    assert worst(run_rows(decoder, rows()), expected) / scale < TOLERANCE["fp16"]


def test_order_of_layers_does_not_matter(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    source = exported("llama")
    rewrite(source, tmp_path / "once", random_maps(0, 2))
    rewrite(source, tmp_path / "first", random_maps(2))
    rewrite(tmp_path / "first", tmp_path / "second", random_maps(0))
    one, two = (run_rows(OnnxDecoder(tmp_path / n, HEAD_DIM), rows()) for n in ("once", "second"))
    assert worst(one, two) == 0.0


def test_empty_plan_gives_back_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    source = exported("llama")
    rewrite(source, tmp_path / "nbl", {})
    names = sorted(p.name for p in source.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "nbl").iterdir())
    assert all((source / n).read_bytes() == (tmp_path / "nbl" / n).read_bytes() for n in names)


def test_planted_affine_attention_is_recovered(checkpoint: Any, text: Path, tmp_path: Path) -> None:
    """A model whose attention is affine already: the fit finds it, and the original's logits come back."""
    from nbl_export.calibrate import collect
    from nbl_export.mixers.linear import LINEAR
    from nbl_export.model.checkpoint.load import load_tokenizer
    from nbl_export.text import corpus
    from nbl_export.text import windows as text_windows

    planted = {1: Linear(*_small_map())}
    model = linearize(load_model(checkpoint("llama")), planted)
    windows, _ = text_windows.pack(corpus.read_text(str(text)), load_tokenizer(checkpoint("llama")), 4096, 64)
    found = LINEAR.fit(collect.collect(model, windows, lambda _d, _t: None)["residual"][1], 1)
    np.testing.assert_allclose(found.weight, planted[1].weight, atol=2e-4)
    np.testing.assert_allclose(found.bias, planted[1].bias, atol=2e-4)


def _small_map() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((HIDDEN, HIDDEN)) / 20).astype(np.float32), rng.standard_normal(HIDDEN).astype("f")


def test_quantised_maps_like_their_neighbours(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    for precision, bits in (("int4", 4), ("int8", 8)):
        out = tmp_path / precision
        rewrite(exported("llama", "genai", precision), out, random_maps(1))
        graph = ir.load(out / "model.onnx").graph
        (node,) = [n for n in graph if (n.name or "").startswith("/nbl/layers.1/MatMul")]
        neighbour = next(n for n in graph if n.op_type == "MatMulNBits" and "/mlp/" in str(n.name))
        assert node.op_type == "MatMulNBits"
        for name in ("bits", "block_size", "accuracy_level"):
            assert node.attributes[name].value == neighbour.attributes[name].value
        assert node.attributes["bits"].value == bits
        assert not any(n.startswith("nbl.layers.1.weight") and n.endswith("weight") for n in graph.initializers)


def test_int4_maps_are_as_good_as_four_bits_allow(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    """The packed weight, unpacked, is the map within half a step of a block, and half a step more of its zero point."""
    rewrite(exported("llama", "genai", "int4"), tmp_path / "nbl", random_maps(1))
    graph = ir.load(tmp_path / "nbl" / "model.onnx").graph
    (node,) = [n for n in graph if (n.name or "").startswith("/nbl/layers.1/MatMul")]
    packed, scales, points = (
        v.const_value.numpy() for v in node.inputs[1:] if v is not None and v.const_value is not None
    )
    halves = [np.stack([a & 15, a >> 4], -1).reshape(HIDDEN, -1).astype(np.float32) for a in (packed, points)]
    steps, middle = (np.repeat(a.reshape(HIDDEN, -1)[:, : HIDDEN // 32], 32, 1) for a in (scales, halves[1]))
    restored = (halves[0] - middle) * steps
    assert (np.abs(restored - random_maps(1)[1].weight) <= np.abs(steps) * 1.01).all()


# -- refusals ----------------------------------------------------------------------------------------------


def test_refuses_layers_that_are_not_there(exported: Exported, random_maps: Maps, tmp_path: Path) -> None:
    rewrite(exported("llama"), tmp_path / "nbl", random_maps(1))
    with pytest.raises(RefusalError, match="layer 1: it has no attention, so it is replaced already; layers 0, 2"):
        rewrite(tmp_path / "nbl", tmp_path / "again", random_maps(1))


def test_refuses_a_map_of_another_size(exported: Exported, tmp_path: Path) -> None:
    wrong = {1: Linear(np.zeros((32, 32), np.float32), np.zeros(32, np.float32))}
    with pytest.raises(RefusalError, match="layer 1"):
        rewrite(exported("llama", "mobius"), tmp_path / "nbl", wrong)


def test_refuses_a_block_without_a_residual_join(exported: Exported, random_maps: Maps) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    for node in model.graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            node.op_type = "SomethingElse"
    with pytest.raises(RefusalError, match="layer 1: no residual addition"):
        rewrite_model(model, random_maps(1))


def test_refuses_a_cache_that_is_read_elsewhere(exported: Exported, random_maps: Maps) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.1.key")
    spy = ir.node("Identity", [past], name="spy")
    spy.outputs[0].name, spy.outputs[0].type, spy.outputs[0].shape = "seen", past.type, past.shape
    model.graph.append(spy)
    model.graph.outputs.append(spy.outputs[0])
    with pytest.raises(RefusalError, match="layer 1"):
        rewrite_model(model, random_maps(1))


def test_a_read_cache_is_not_dropped(exported: Exported) -> None:
    model = ir.load(exported("llama") / "model.onnx")
    with pytest.raises(RefusalError, match=r"layer 1: its cache past_key_values\.1\.key is still read by"):
        run_passes((rewriting.DropCaches((1,)), rewriting.DropUnreadCaches()), model)


def test_past_length_reader_moves_to_a_kept_cache(exported: Exported, random_maps: Maps) -> None:
    """A graph that reads the past length off the cache of layer 0, as exporters do, after layer 0 is replaced."""
    model = ir.load(exported("llama") / "model.onnx")
    past = next(v for v in model.graph.inputs if v.name == "past_key_values.0.key")
    reader = ir.node("Shape", [past], name="past_shape")
    reader.outputs[0].name, reader.outputs[0].type = "past_shape", ir.TensorType(ir.DataType.INT64)
    model.graph.append(reader)
    model.graph.outputs.append(reader.outputs[0])
    rewrite_model(model, random_maps(0))
    assert reader.inputs[0] is not None
    assert reader.inputs[0].name == "past_key_values.1.key"


# -- planted faults: each is caught by the comparison that the verification ladder makes -----------------------


def transposed(maps: dict[int, Linear]) -> dict[int, Linear]:
    return {i: Linear(np.ascontiguousarray(m.weight.T), m.bias) for i, m in maps.items()}


def without_bias(maps: dict[int, Linear]) -> dict[int, Linear]:
    return {i: Linear(m.weight, np.zeros_like(m.bias)) for i, m in maps.items()}


@pytest.mark.parametrize("fault", [transposed, without_bias])
def test_fault_in_the_maps_is_seen(
    fault: Callable[[dict[int, Linear]], dict[int, Linear]],
    checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path,
) -> None:  # fmt: skip
    maps = random_maps(1)
    rewrite(exported("llama"), tmp_path / "nbl", fault(maps))
    got = run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows())
    assert worst(got, torch_logits(checkpoint("llama"), maps)) > 100 * TOLERANCE["fp32"]


def test_fault_wrong_tap_is_seen(
    checkpoint: Any, exported: Exported, random_maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map fed with the normed input instead of the residual stream."""

    def off_by_a_norm(block: Any, _tap: str) -> ir.Value:
        return block.residual.producer().outputs[0]

    monkeypatch.setattr(rewriting.blocks, "tapped", off_by_a_norm)
    rewrite(exported("llama"), tmp_path / "nbl", random_maps(1))
    got = run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows())
    assert worst(got, torch_logits(checkpoint("llama"), random_maps(1))) > 100 * TOLERANCE["fp32"]


def test_fault_wrong_cache_kept_is_refused(
    exported: Exported, random_maps: Maps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 1 is bypassed, but the caches of layer 2 are dropped: attention still reads them."""
    drop = rewriting.DropCaches
    monkeypatch.setattr(rewriting, "DropCaches", lambda _layers: drop((2,)))
    with pytest.raises(RefusalError):
        rewrite(exported("llama"), tmp_path / "nbl", random_maps(1))


def test_fault_position_off_by_one_is_seen(
    checkpoint: Any, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that is told of one token too many in its past."""
    decoder = OnnxDecoder(exported("llama"), HEAD_DIM)
    begin = decoder.begin

    def begin_late(batch: int) -> None:
        begin(batch)
        decoder._mask_BT = np.ones((batch, 1), np.int64)
        decoder._past = {
            name: np.zeros((batch, array.shape[1], 1, array.shape[3]), array.dtype)
            for name, array in decoder._past.items()
        }

    monkeypatch.setattr(decoder, "begin", begin_late)
    got = run_rows(decoder, rows()[:1])  # GroupQueryAttention takes a chunk after a past for one sequence only
    assert worst(got, torch_logits(checkpoint("llama"), {})[:1]) > 100 * TOLERANCE["fp32"]
