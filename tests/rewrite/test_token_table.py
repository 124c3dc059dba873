"""Replaced layers at the bottom of the stack as a table of tokens: the same logits, fewer nodes, and proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from nbl_export.graph.decoder import OnnxDecoder
from nbl_export.graph.facts import replaced_layers
from nbl_export.mixers.linear import Linear
from nbl_export.model.checkpoint.load import load_model, read_spec
from nbl_export.model.checkpoint.source import resolve
from nbl_export.model.linearize import linearize
from nbl_export.model.one_layer import token_rows
from nbl_export.records.plan import TAPS, Plan
from nbl_export.rewrite import rewrite
from nbl_export.targets import onnx_files as files
from nbl_export.verify.ladder import run_rows

from ..command import configured, nbl
from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB, cases, made_by, record_of, save_checkpoint
from .test_rewrite import GRAPHS, TOLERANCE, rows, torch_logits, worst

Exported = Callable[..., Path]
Maps = Callable[..., dict[int, Linear]]
FEATURED = [(a, s) for s in ("genai", "mobius") for a in made_by(s) if a not in dict(GRAPHS)]
TAPPED = [(*g, tap) for g in (*GRAPHS, *FEATURED) for tap in TAPS if tap in record_of(g[0]).taps]


def graph_of(directory: Path) -> ir.Graph:
    return ir.load(directory / "model.onnx").graph


def products(directory: Path) -> int:
    return sum(node.op_type.startswith("MatMul") for node in graph_of(directory))


@pytest.fixture
def tabulated(exported: Exported, checkpoint: Any, random_maps: Maps, tmp_path: Path) -> Callable[..., Any]:
    """(architecture, source, replaced, tap, precision) -> NBL directory, its maps and its rows."""

    def make(
        architecture: str = "llama", source: str = "genai", replaced: tuple[int, ...] = (0,), tap: str = "residual",
        precision: str = "fp32",
    ) -> tuple[Path, dict[int, Linear], np.ndarray]:  # fmt: skip
        maps = random_maps(*replaced)
        rows_VD = token_rows(checkpoint(architecture), maps, tap)
        assert rows_VD is not None
        plan = Plan(LAYERS, replaced, tap)
        out = tmp_path / f"nbl-{len(list(tmp_path.iterdir()))}"
        rewrite(exported(architecture, source, precision), out, plan, maps, rows_VD=rows_VD)
        return out, maps, rows_VD

    return make


@pytest.mark.parametrize(("architecture", "source", "tap"), cases(TAPPED))
def test_logits_are_those_of_the_layers(
    architecture: str, source: str, tap: str, tabulated: Any, checkpoint: Any
) -> None:
    head_dim = read_spec(resolve(str(checkpoint(architecture)))).head_dim
    for replaced in ((0,), (0, 1), (0, 2)):
        directory, maps, rows_VD = tabulated(architecture, source, replaced, tap)
        expected = torch_logits(checkpoint(architecture), maps, tap)
        assert worst(run_rows(OnnxDecoder(directory, head_dim), rows()), expected) < TOLERANCE["fp32"], replaced
        assert replaced_layers(graph_of(directory)) == list(replaced)
        (result,) = files.check_maps("nbl", directory, maps, rows_VD)
        assert result.passed, result.detail


def test_the_norm_behind_a_table_keeps_its_epsilon(random_maps: Maps, tmp_path: Path) -> None:
    """An epsilon of 1, which no default is near, on a stream that a skip norm made."""
    from tests.exports import build_decoder

    model = save_checkpoint("llama", tmp_path / "checkpoint", rms_norm_eps=1.0)
    build_decoder("genai", model, tmp_path / "original", "fp32")
    maps = random_maps(0)
    rows_VD = token_rows(model, maps, "residual")
    rewrite(tmp_path / "original", tmp_path / "nbl", Plan(LAYERS, tuple(maps)), maps, rows_VD=rows_VD)
    (norm,) = (node for node in graph_of(tmp_path / "nbl") if node.name == "/nbl/token_table/norm")
    assert norm.attributes["epsilon"].as_float() == 1.0
    got = run_rows(OnnxDecoder(tmp_path / "nbl", HEAD_DIM), rows())
    assert worst(got, torch_logits(model, maps)) < TOLERANCE["fp32"]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_products_of_the_layers_are_gone(precision: str, tabulated: Any, exported: Exported, tmp_path: Path) -> None:
    for replaced, layers in (((0,), 1), ((0, 1), 2), ((0, 2), 1)):
        directory, maps, rows_VD = tabulated(replaced=replaced, precision=precision)
        computed = tmp_path / f"computed{replaced[-1]}"
        rewrite(exported("llama", "genai", precision), computed, Plan(LAYERS, replaced), maps)
        assert products(computed) - products(directory) == 4 * layers  # a map, gate, up and down
        (result,) = files.check_maps("nbl", directory, maps, rows_VD)
        assert result.passed and f"a table for the first {layers}" in result.detail, replaced


def test_a_table_of_a_quantised_graph_has_8_bits(tabulated: Any) -> None:
    """It errs by less than half a step, and what it enters is then the same int4 graph with finer first layers."""
    directory, _, rows_VD = tabulated(precision="int4")
    constants = graph_of(directory).initializers
    codes, scales = (constants[f"nbl.layers.0.table{end}"].const_value for end in ("", "_scales"))
    assert codes is not None and scales is not None and codes.dtype == ir.DataType.UINT8
    steps = np.repeat(scales.numpy(), 32, 1)
    assert (np.abs((codes.numpy() - 128.0) * steps - rows_VD) <= 0.501 * steps).all()
    node = next(n for n in graph_of(directory) if n.name == "/nbl/token_table")
    session = OnnxDecoder(directory, HEAD_DIM)  # ONNX Runtime reads it so
    assert node.op_type == "GatherBlockQuantized" and np.isfinite(run_rows(session, rows())[0]).all()


def test_half_precision(tabulated: Any, checkpoint: Any) -> None:
    directory, maps, rows_VD = tabulated(source="mobius", precision="fp16")
    got = run_rows(OnnxDecoder(directory, HEAD_DIM), rows())
    assert worst(got, torch_logits(checkpoint("llama"), maps)) < TOLERANCE["fp16"]
    (result,) = files.check_maps("nbl", directory, maps, rows_VD)
    assert result.passed, result.detail


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_changed_row_is_found(precision: str, tabulated: Any) -> None:
    directory, maps, rows_VD = tabulated(precision=precision)
    proto = onnx.load(directory / "model.onnx")
    table = next(t for t in proto.graph.initializer if t.name == "nbl.layers.0.table")
    values = onnx.numpy_helper.to_array(table).copy()
    values[7, 3] = 0 if values[7, 3] > 100 else values[7, 3] + 100
    table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(proto, directory / "model.onnx")
    (result,) = files.check_maps("nbl", directory, maps, rows_VD)
    assert not result.passed and result.detail.startswith("token 7 of nbl.layers.0.table")


def test_a_missing_table_is_found(exported: Exported, checkpoint: Any, random_maps: Maps, tmp_path: Path) -> None:
    maps = random_maps(0, 1)
    rewrite(exported("llama"), tmp_path / "nbl", Plan(LAYERS, (0, 1)), maps)
    rows_VD = token_rows(checkpoint("llama"), maps, "residual")
    (result,) = files.check_maps("nbl", tmp_path / "nbl", maps, rows_VD)
    assert not result.passed and "no table nbl.layers.0-1.table" in result.detail


@pytest.mark.parametrize("tap", TAPS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "granite"])
def test_rows_are_what_enters_the_first_kept_layer(
    architecture: str, tap: str, checkpoint: Any, random_maps: Maps
) -> None:
    """Whatever the position and the tokens before it."""
    maps = random_maps(0, 1)
    rows_VD = token_rows(checkpoint(architecture), maps, tap)
    model = linearize(load_model(checkpoint(architecture)), maps, tap)
    seen: list[torch.Tensor] = []
    model.get_decoder().layers[2].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    ids = torch.randint(VOCAB, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(ids, use_cache=False)
    assert rows_VD is not None and rows_VD.shape[0] == VOCAB
    assert np.abs(rows_VD[ids.numpy()] - seen[0].numpy()).max() < 1e-5


def test_no_rows_where_layer_0_is_kept(checkpoint: Any, random_maps: Maps) -> None:
    assert token_rows(checkpoint("llama"), random_maps(1, 2), "residual") is None


def test_a_run_says_what_it_looks_up(run: Path, same: tuple[object, ...], tmp_path: Path) -> None:
    """And computes the layers where that is asked for; both are proven."""
    assert nbl("plan", run, "--layers", "0,2").status == 0
    proven = json.loads(nbl("verify", run, "--json").out)
    assert proven["passed"] and any("a table for the first 1" in r["detail"] for r in proven["checks"])
    manifest = json.loads((run / "nbl.json").read_text())
    assert manifest["token_table"] == {"layers": [0], "bytes": 4 * VOCAB * HIDDEN}
    told = nbl("inspect", run).out
    assert "looked up" in told and "0: a table of tokens" in told
    assert ". Leading linearized layers are replaced by a per-token lookup table: layer 0, " in page(run)
    computed = products(run / "model")
    without = configured(tmp_path, token_table=False)
    assert nbl(*same, "--layers", "0,2", *without, "--output", run).status == 0
    assert json.loads((run / "nbl.json").read_text())["token_table"] is None
    assert products(run / "model") - computed == 4
    assert "looked up" not in nbl("inspect", run).out and "lookup table" not in page(run)


def page(run: Path) -> str:
    assert nbl("report", run).status == 0
    return " ".join((run / "report.html").read_text(encoding="utf-8").split())
