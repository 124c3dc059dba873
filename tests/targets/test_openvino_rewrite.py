"""Laws of the rewrite of IRs, and faults that verification finds in them."""

from __future__ import annotations

import functools
import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.anatomy import states_of
from nbl_export.graph.ir.files import precision_of, read_ir, save_ir, stored_matrix
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.methods.linear.maps import Linear
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.targets.checks import judge_maps, stored_maps
from nbl_export.targets.openvino import check as ir_files
from nbl_export.targets.openvino.engine import OPENVINO

from ..tiny import HEAD_DIM, HIDDEN, LAYERS, VOCAB, made_by, random_map

pytestmark = pytest.mark.engine

SUBSETS = [s for n in (1, 2) for s in itertools.combinations(range(LAYERS), n)]
IDS = np.random.default_rng(3).integers(2, VOCAB, (2, 40))
LENGTHS = (24, 17)
STEPS = 6


FEW = ("mistral-window", "olmo2", "granite", "gpt_oss")  # a window, a norm behind attention, multipliers, experts
OTHERS = [pytest.param(a, marks=() if a in FEW else pytest.mark.fuzz) for a in made_by("openvino") if a != "llama"]


@pytest.fixture(scope="module")
def pair(
    exported_ir: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """(architecture, replaced, precision, tap) -> the original with both graphs, and its NBL version."""

    @functools.cache
    def make(
        architecture: str, replaced: tuple[int, ...], precision: str = "fp32", tap: str = "residual"
    ) -> tuple[Path, Path]:
        source = exported_ir(architecture, precision)
        out = tmp_path_factory.mktemp("pair") / "model"
        OPENVINO.linearize(source, out, {i: random_map(i) for i in replaced}, tap)
        return source, out

    return make


def expected(checkpoint: Path, maps: Mapping[int, Linear], source: Path, out: Path, tap: str) -> np.ndarray:
    """Logits of the torch model with maps; if the IR is not float32, of the original IR with those that `out` has."""
    if precision_of(read_ir(out)) != "fp32":
        mixers = stored_maps(ir_files.read_maps(out), maps)
        decoder = OPENVINO.open_reference(source, HEAD_DIM, mixers, tap, exact=True)
        decoder.begin(2)
        return decoder.step(IDS)
    import torch

    from nbl_export.methods.applied import linearize
    from nbl_export.methods.checkpoint import load

    with torch.no_grad():
        found = linearize(load.load_model(checkpoint), maps, tap)(torch.from_numpy(IDS)).logits
    return np.asarray(found.numpy())


def run(directory: Path, file: str) -> list[np.ndarray]:
    """Logits of a batch of two lengths: prefill, then steps."""
    decoder = IrDecoder(directory, file, exact=True)
    valid = (np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]).astype(np.int64)
    decoder.begin(2)
    found = [decoder.step(IDS[:, : max(LENGTHS)] * valid, valid)]
    for k in range(STEPS):
        found.append(decoder.step(np.stack([row[n + k : n + k + 1] for row, n in zip(IDS, LENGTHS, strict=True)])))
    return found


def away(checkpoint: Path, source: Path, out: Path, maps: Mapping[int, Linear], tap: str = "residual") -> float:
    """Largest difference of any logit from torch's, of the graph with all logits and of the one that ships."""
    truth = expected(checkpoint, maps, source, out, tap)
    every, last = run(out, ALL_LOGITS_IR), run(out, IR_FILE)
    worst = 0.0
    for row, length in enumerate(LENGTHS):
        worst = max(worst, float(np.abs(every[0][row, :length] - truth[row, :length]).max()))
        worst = max(worst, float(np.abs(last[0][row, 0] - truth[row, length - 1]).max()))
        for k in range(STEPS):
            for found in (every, last):
                worst = max(worst, float(np.abs(found[1 + k][row, 0] - truth[row, length + k]).max()))
    return worst


@pytest.mark.parametrize("replaced", SUBSETS)
def test_every_subset_keeps_parity(
    pair: Callable[..., tuple[Path, Path]], checkpoint: Callable[[str], Path], replaced: tuple[int, ...]
) -> None:
    source, out = pair("llama", replaced)
    assert away(checkpoint("llama"), source, out, {i: random_map(i) for i in replaced}) < 1e-4
    assert list(states_of(read_ir(out))) == [i for i in range(LAYERS) if i not in replaced]
    assert len(read_ir(out).get_sinks()) == 2 * (LAYERS - len(replaced))


@pytest.mark.parametrize("architecture", OTHERS)
def test_every_architecture_keeps_parity(
    pair: Callable[..., tuple[Path, Path]], checkpoint: Callable[[str], Path], architecture: str
) -> None:
    source, out = pair(architecture, (1,))
    assert away(checkpoint(architecture), source, out, {1: random_map(1)}) < 1e-4
    assert IrDecoder(out).contract.logits == "last"


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("tap", ["residual", "normed"])
def test_maps_get_the_codes_of_their_neighbours(
    pair: Callable[..., tuple[Path, Path]], checkpoint: Callable[[str], Path], precision: str, tap: str
) -> None:
    source, out = pair("llama", (0, 1), precision, tap)
    maps = {i: random_map(i) for i in (0, 1)}
    assert precision_of(read_ir(out)) == precision
    assert away(checkpoint("llama"), source, out, maps, tap) < 1e-4
    products = {n.get_friendly_name(): n for n in read_ir(out).get_ops() if n.get_type_name() == "MatMul"}
    neighbour = next(name for name in products if "layers.0.mlp.up_proj" in name)
    found = [stored_matrix(products[name]) for name in (neighbour, "/nbl/layers.0/MatMul", "/nbl/layers.1/MatMul")]
    assert len({blocks.size for blocks in found if blocks is not None}) == 1 and None not in found
    assert judge_maps("nbl", ir_files.read_maps(out), maps).passed
    assert ir_files.check_untouched(out, source).passed
    assert ir_files.check_pruned("nbl", out).passed


def test_the_empty_plan_gives_back_the_files(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    source, _ = pair("llama", (1,))
    OPENVINO.linearize(source, tmp_path / "model", {})
    files = sorted(p.name for p in source.iterdir())
    assert files == sorted(p.name for p in (tmp_path / "model").iterdir())
    assert all((source / n).read_bytes() == (tmp_path / "model" / n).read_bytes() for n in files)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_map_without_a_bias_has_no_addition(
    pair: Callable[..., tuple[Path, Path]], checkpoint: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    source, _ = pair("llama", (1,), precision)
    maps = {1: Linear(random_map(1).weight, np.zeros(HIDDEN, np.float32))}
    OPENVINO.linearize(source, tmp_path / "model", maps, "normed")
    names = {n.get_friendly_name() for n in read_ir(tmp_path / "model").get_ops()}
    assert "/nbl/layers.1/MatMul" in names and "/nbl/layers.1/Add" not in names
    assert away(checkpoint("llama"), source, tmp_path / "model", maps, "normed") < 1e-4
    assert judge_maps("nbl", ir_files.read_maps(tmp_path / "model"), maps).passed
    wrong = judge_maps("nbl", ir_files.read_maps(tmp_path / "model"), {1: random_map(1)})
    assert "layer 1 has no bias" in wrong.detail


def test_maps_that_compression_leaves_in_float32_are_refused(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbl_export.targets.openvino import rewrite as rewriting

    source, _ = pair("llama", (1,), "int8")
    monkeypatch.setattr(rewriting, "compress", lambda model, *_, **__: model)
    with pytest.raises(RefusalError, match=r"/nbl/layers.1/MatMul was left in float32"):
        OPENVINO.linearize(source, tmp_path / "model", {1: random_map(1)})


@pytest.mark.parametrize(
    ("architecture", "tap", "maps", "said"),
    [
        ("llama", "residual", {3: random_map(3)}, r"states for layers \[0, 1, 2\] only"),
        ("olmo2", "normed", {1: random_map(1)}, "which tap normed needs"),
        ("llama", "residual", {1: Linear(np.eye(8, dtype=np.float32), np.zeros(8, np.float32))},
         "96 wide, the map 8"),
        ("llama", "residual", {i: random_map(i) for i in range(3)}, "no attention layer would keep its cache"),
        ("llama", "residual", {1: PredictedKV(np.zeros((HIDDEN, 2 * HIDDEN)), np.zeros(HIDDEN), HIDDEN, 1, 8, 1e-6)},
         r"maps are for layers \[1\], and layers \[1, 2\] have attention"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(
    exported: Callable[..., Path], tmp_path: Path, architecture: str, tap: str, maps: Any, said: str
) -> None:
    with pytest.raises(RefusalError, match=said):
        OPENVINO.linearize(exported(architecture, "openvino", "fp32"), tmp_path / "model", maps, tap)


def swapped(maps: dict[int, Linear]) -> dict[int, Linear]:
    return {0: maps[1], 1: maps[0]}


def transposed(maps: dict[int, Linear]) -> dict[int, Linear]:
    return {**maps, 0: Linear(maps[0].weight.T.copy(), maps[0].bias)}


def without_bias(maps: dict[int, Linear]) -> dict[int, Linear]:
    return {**maps, 1: Linear(maps[1].weight, 0 * maps[1].bias)}


@pytest.mark.parametrize("fault", [swapped, transposed, without_bias])
def test_wrong_maps_are_found(
    pair: Callable[..., tuple[Path, Path]], tmp_path: Path, fault: Callable[[Any], dict[int, Linear]]
) -> None:
    source, _ = pair("llama", (0, 1), "int4")
    maps = {i: random_map(i) for i in (0, 1)}
    OPENVINO.linearize(source, tmp_path / "model", fault(maps))
    assert not judge_maps("nbl", ir_files.read_maps(tmp_path / "model"), maps).passed
    assert judge_maps("nbl", ir_files.read_maps(tmp_path / "model"), fault(maps)).passed


def test_a_changed_weight_is_found(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    from openvino import opset13 as ops

    source, out = pair("llama", (1,))
    model = read_ir(out)
    node = next(n for n in model.get_ops() if "layers.2.mlp.down_proj.weight" in n.get_friendly_name())
    changed = ops.constant(node.get_data() * 1.01, name=node.get_friendly_name())
    for reader in node.output(0).get_target_inputs():
        reader.replace_source_output(changed.output(0))
    (tmp_path / "model").mkdir()
    save_ir(model, tmp_path / "model", "fp32")
    found = ir_files.check_untouched(tmp_path / "model", source)
    assert not found.passed and "layers.2.mlp.down_proj.weight" in found.detail


def test_another_graph_than_the_pruned_one_is_found(pair: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    _, out = pair("llama", (1,))
    shutil.copytree(out, tmp_path / "model")
    (tmp_path / "model" / IR_FILE).write_bytes((out / ALL_LOGITS_IR).read_bytes())
    assert not ir_files.check_pruned("nbl", tmp_path / "model").passed
