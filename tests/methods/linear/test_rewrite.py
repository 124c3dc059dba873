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

from nbl_export.errors import RefusalError
from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.emitter import run_passes
from nbl_export.methods import rewrite as rewriting
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.rewrite import rewrite, rewrite_model
from nbl_export.records.plan import TAPS
from nbl_export.verify.ladder import DECODE_STEPS, run_rows
from tests.contracts import contract_of
from tests.tiny import ARCHITECTURES, HEAD_DIM, LAYERS, VOCAB

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
        run_passes((rewriting.DropCaches((1,)),), model)


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
