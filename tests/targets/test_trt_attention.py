"""Attention is fused if the library has a kernel, and decomposed on purpose if it has none; engine.json says which."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

from nbl_export.errors import NblError
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.tensorrt import build, network
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.library import load_library, messages_of
from nbl_export.targets.tensorrt.network import ParsedNetwork, lacks_kernel, parse
from nbl_export.targets.tensorrt.record import read_record

from ..static_tiny import LAYERS, save_checkpoint
from ..trt_tiny import PLAIN, RTX, graph_of, needs_rtx

pytestmark = pytest.mark.trt

# The rules of RTX unknown, as those of TensorRT are: its builder decides.
UNKNOWN = dataclasses.replace(RTX, fused=None)
ONE = BuildSettings(1, 16)
NO_KERNEL: list[dict[str, int]] = [{"head_dim": 8}, {"num_attention_heads": 2, "num_key_value_heads": 1}]


@pytest.fixture(params=NO_KERNEL, ids=["heads of 8", "2 heads"])
def without_kernel(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The graph of a tiny Llama that RTX has no fused attention kernel for."""
    checkpoint = save_checkpoint("llama", tmp_path / "checkpoint", **request.param)
    static.build(checkpoint, tmp_path / "graph", "fp16", max_seq_len=32)
    return tmp_path / "graph"


@needs_rtx
@pytest.mark.parametrize("library", [RTX, UNKNOWN], ids=["known", "the builder says so"])
def test_attention_without_a_kernel_is_decomposed(
    library: Any, without_kernel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = build_engine(library, without_kernel, tmp_path / "e", ONE)
    assert record.attention == read_record(tmp_path / "e").attention == "decomposed"
    (told,) = [r.getMessage() for r in caplog.records if r.name == build.__name__]
    assert "graph: attention is decomposed" in told
    assert ("no fused attention kernel for" if library is RTX else "not supported by a dedicated kernel") in told


@needs_rtx
@pytest.mark.parametrize("library", [RTX, UNKNOWN], ids=["known", "the builder says so"])
def test_attention_with_a_kernel_is_fused_in_one_build(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    builds: list[str] = []
    monkeypatch.setattr(build, "decompose", lambda parsed: builds.append("decomposed"))
    assert build_engine(library, graph_of("llama", (1,)), tmp_path / "e", ONE).attention == "fused"
    assert not builds and not caplog.records


@needs_rtx
def test_what_builds_neither_way_says_both_reasons(
    without_kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "decompose", lambda parsed: True)  # and changes nothing
    reason = r"does not build graph: .*dedicated kernel.*; with fused attention: .* no fused attention kernel for"
    with pytest.raises(NblError, match=reason):
        build_engine(RTX, without_kernel, tmp_path / "e", ONE)
    monkeypatch.setattr(build, "decompose", lambda parsed: False)  # no attention is left
    with pytest.raises(NblError, match=r"does not build graph: TensorRT for RTX has no fused attention kernel for"):
        build_engine(RTX, without_kernel, tmp_path / "e", ONE)
    assert not (tmp_path / "e").exists()


@needs_rtx
def test_every_attention_layer_of_a_network_is_decomposed() -> None:
    trt = load_library(RTX)
    parsed = parse(trt, messages_of(trt), graph_of("llama") / "decoder.onnx")
    assert network.decompose(parsed)
    layers = [layer for layer in parsed.layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    for layer in layers:
        layer.__class__ = trt.IAttentionInputLayer
    assert [layer.attention.decomposable for layer in layers] == [True] * LAYERS


@needs_rtx
@pytest.mark.parametrize("bypass", [False, True])
def test_the_cache_reaches_attention_without_a_product(bypass: bool) -> None:
    """The parser puts a product with 1 between them, which is the library's own doing."""
    trt = load_library(RTX)
    parsed = parse(trt, messages_of(trt), graph_of("llama", (1,)) / "decoder.onnx")
    if bypass:
        network.bypass_unit_scale(parsed)
    made_by = {layer.get_output(i).name: layer for layer in parsed.layers for i in range(layer.num_outputs)}
    sources = [
        [made_by[layer.get_input(k).name].type.name for k in range(3)]
        for layer in parsed.layers
        if layer.type == trt.LayerType.ATTENTION_INPUT
    ]
    key = "KV_CACHE_UPDATE" if bypass else "ELEMENTWISE"
    assert sources == [["ELEMENTWISE", key, "KV_CACHE_UPDATE"]] * (LAYERS - 1)
    for layer in parsed.layers:
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            assert ("scaled" in layer.get_input(0).name) is bypass  # the graph's own product, by 1/8


@needs_rtx
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_a_product_with_another_number_stays(scale: float, tmp_path: Path) -> None:
    model = ir.load(graph_of("llama") / "decoder.onnx")
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
    static.save_graph(model, tmp_path)
    trt = load_library(RTX)
    parsed = parse(trt, messages_of(trt), tmp_path / "decoder.onnx")
    layers = [layer for layer in parsed.layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    before = [layer.get_input(k).name for layer in layers for k in (0, 1)]
    network.bypass_unit_scale(parsed)
    assert [layer.get_input(k).name for layer in layers for k in (0, 1)] == before


def parsed_of(heads: int, size: int, precision: str) -> ParsedNetwork:
    """What `lacks_kernel` reads of a network with one attention layer."""
    query = SimpleNamespace(shape=(-1, heads, -1, size))
    layer = SimpleNamespace(type="attention", get_input=lambda _index: query)
    trt = SimpleNamespace(LayerType=SimpleNamespace(ATTENTION_INPUT="attention"))
    found: Any = SimpleNamespace(trt=trt, layers=[layer], precision=precision)
    return found


@pytest.mark.parametrize(
    ("heads", "size", "precision", "reason"),
    [
        (9, 64, "fp16", ""), (4, 256, "bf16", ""), (4, 16, "int4", ""), (9, 64, "fp32", "for fp32"),
        (9, 20, "fp16", "heads of size 20 .* multiples of 8 from 16 to 256"), (9, 264, "bf16", "heads of size 264"),
        (3, 64, "fp16", "3 query heads .minimum 4"),
    ],
)  # fmt: skip
def test_the_rules_of_one_library_are_not_those_of_the_other(
    heads: int, size: int, precision: str, reason: str
) -> None:
    parsed = parsed_of(heads, size, precision)
    found = lacks_kernel(RTX, parsed)
    assert bool(found) is bool(reason) and re.search(reason, found), found
    assert lacks_kernel(PLAIN, parsed) == ""
