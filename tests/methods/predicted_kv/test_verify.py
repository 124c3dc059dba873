"""Plans with an exit layer: all checks pass on right graphs, and each planted fault is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE
from nbl_export.methods.base import Mixer
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.targets.checks import MAPS
from nbl_export.verify import ladder
from tests.exits import predicted_maps
from tests.tiny import HEAD_DIM, HIDDEN, KV_HEADS
from tests.verify.test_tiny_graphs import check
from tests.verifying import verify_tiny

pytestmark = pytest.mark.job

W = 4
KEYS = KV_HEADS * HEAD_DIM
PREFILL = ("nbl", "nbl", "relative rms logit difference, prefill")
LAST = ("last_token", "nbl", "relative rms logit difference, last token")
AS_FITTED = ("structure", "nbl", MAPS)

Checkpoint = Callable[[str], Path]
Maps = dict[int, PredictedKV]
Fault = Callable[[Mapping[str, ir.Node], ir.Model], None]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long row has three chunks, two of them behind a cache."""
    monkeypatch.setattr(ladder, "LONG_CHUNK", 64)


@pytest.mark.parametrize(
    ("architecture", "source", "precision", "exit_layer"),
    [("llama", "genai", "fp32", 1), ("qwen2", "genai", "int4", 1),
     ("llama", "genai", "int8", 2), ("qwen2", "static", "fp32", 2), ("llama", "static", "bf16", 1),
     ("llama", "static", "int4", 1)],
)  # fmt: skip
def test_all_checks_pass(
    architecture: str, source: str, precision: str, exit_layer: int, checkpoint: Checkpoint,
    exported: Any, tmp_path: Path,
) -> None:  # fmt: skip
    maps = predicted_maps(exit_layer, W, KEYS)
    found = verify_tiny(
        checkpoint(architecture), source, precision, tmp_path, tuple(maps), mixer_of=maps.__getitem__,
        exported=exported(architecture, source, precision) if source == "genai" else None,
    )  # fmt: skip
    check(found, source, precision)
    cases = {r.detail for r in found if r.subject == "nbl"}
    assert cases >= {"batch of 2, all tokens continue", "prefill of 6 tokens", "batch of lengths 5 and 16, then decode"}
    assert any("chunks of 64" in case for case in cases)


# -- faults of the map or of the exit layer that the graph gets
# ----------------------------------------------------------


def with_recent(maps: Maps, recent_tokens: int) -> Maps:
    return {layer: dataclasses.replace(mixer, recent_tokens=recent_tokens) for layer, mixer in maps.items()}


def exchanged(maps: Maps) -> Maps:
    """Keys for values, and the other way round."""
    return {
        layer: dataclasses.replace(mixer, weight=np.roll(mixer.weight, KEYS, 0), bias=np.roll(mixer.bias, KEYS))
        for layer, mixer in maps.items()
    }


def turned(maps: Maps) -> Maps:
    """The token before for the token itself."""
    return {layer: dataclasses.replace(mixer, weight=np.roll(mixer.weight, HIDDEN, 1)) for layer, mixer in maps.items()}


WRITTEN: dict[str, tuple[Callable[[Maps], Maps], tuple[str, str, str]]] = {
    "W is one more": (lambda maps: with_recent(maps, W + 1), PREFILL),
    "W is one less": (lambda maps: with_recent(maps, W - 1), PREFILL),
    "keys and values of a map exchanged": (exchanged, AS_FITTED),
    "the columns of the token before exchanged": (turned, AS_FITTED),
    "maps of two layers exchanged": (lambda maps: {1: maps[2], 2: maps[1]}, AS_FITTED),
}


@pytest.mark.parametrize("fault", WRITTEN)
def test_a_wrong_map_is_named(fault: str, checkpoint: Checkpoint, exported: Any, tmp_path: Path) -> None:
    change, wanted = WRITTEN[fault]
    assert wanted in failed(checkpoint, exported, tmp_path, written=change(predicted_maps(1, W, KEYS)))


def test_a_wrong_exit_layer_is_named(checkpoint: Checkpoint, exported: Any, tmp_path: Path) -> None:
    """Maps read the stream that enters layer 1; the graph gives them that of layer 0, with a map of layer 0."""
    right = predicted_maps(1, W, KEYS)
    wrong = predicted_maps(0, W, KEYS)
    assert PREFILL in failed(checkpoint, exported, tmp_path, right, wrong)


# -- faults of the graph ------------------------------------------------------------------------------------------


def not_rotated(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    rotary = nodes["/nbl/layers.1/KeysRotary"]
    replace_uses(rotary.outputs[0], rotary.inputs[0])


def one_position_off(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    rotary = nodes["/nbl/layers.1/KeysRotary"]
    one = constant(rotary, np.array(1, np.int64))
    moved = ir.node("Add", [rotary.inputs[1], one])
    rotary.prepend(moved)
    rotary.replace_input_with(1, moved.outputs[0])


def from_the_other_side(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    """The map reads the token behind."""
    before = nodes["/nbl/exit/Few/before"]
    for index, row in ((1, 2), (2, 1 - W)):
        before.replace_input_with(index, constant(before, np.array([row])))


def keys_for_values(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    """Behind the map, so that each matrix is as fitted."""
    keys, values = nodes["/nbl/layers.2/KeysValues"].outputs
    of_keys, of_values = list(keys.uses()), list(values.uses())
    for uses, value in ((of_keys, values), (of_values, keys)):
        for node, index in uses:
            node.replace_input_with(index, value)


def own_keys_lost(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    """The keys of the rows that continue are predicted too."""
    scatter = nodes["/nbl/layers.2/Own"]
    replace_uses(scatter.outputs[0], scatter.inputs[0])


def not_seen_by_itself(nodes: Mapping[str, ir.Node], _model: ir.Model) -> None:
    node = nodes["/nbl/exit/Few/seen"]
    node.op_type = "Less"


def row_before_the_last(_nodes: Mapping[str, ir.Node], model: ir.Model) -> None:
    """Of the rows that continue, the last is the last but one of the step."""
    value = model.graph.initializers["nbl.exit.recent"]
    value.const_value = ir.tensor(value.const_value.numpy() - 1, name=value.name)  # type: ignore[union-attr]


def other_last_row(_nodes: Mapping[str, ir.Node], model: ir.Model) -> None:
    """The graph with the logits of the last token takes those of the token before."""
    value = model.graph.initializers["nbl.exit.few"]
    value.const_value = ir.tensor(value.const_value.numpy() - 1, name=value.name)  # type: ignore[union-attr]


def replace_uses(value: ir.Value, other: ir.Value | None) -> None:
    assert other is not None
    value.replace_all_uses_with(other)


def constant(user: ir.Node, array: np.ndarray) -> ir.Value:
    node = ir.node("Constant", [], {"value": ir.tensor(array)})
    user.prepend(node)
    return node.outputs[0]


PLANTED: dict[str, tuple[Fault, tuple[str, str, str]]] = {
    "keys that are not rotated": (not_rotated, PREFILL),
    "keys rotated one position off": (one_position_off, PREFILL),
    "the token behind in place of the token before": (from_the_other_side, PREFILL),
    "values for keys": (keys_for_values, PREFILL),
    "own keys lost": (own_keys_lost, PREFILL),
    "a query that does not see its own token": (not_seen_by_itself, PREFILL),
    "the last row of the prompt does not continue": (row_before_the_last, PREFILL),
    "logits of the last row but one": (other_last_row, LAST),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault: str, checkpoint: Checkpoint, exported: Any, tmp_path: Path) -> None:
    plant, wanted = PLANTED[fault]

    def damage(directory: Path) -> None:
        for name in (GRAPH_FILE, ALL_LOGITS_FILE):
            model = ir.load(directory / name)
            plant({str(node.name): node for node in model.graph.all_nodes()}, model)
            ir.save(model, directory / name)

    assert wanted in failed(checkpoint, exported, tmp_path, damage=damage)


def failed(
    checkpoint: Checkpoint, exported: Any, tmp_path: Path, maps: Mapping[int, Mixer] | None = None,
    written: Mapping[int, Mixer] | None = None, damage: Callable[[Path], None] | None = None,
) -> set[tuple[str, str, str]]:  # fmt: skip
    """Check, subject and metric of what failed; nothing of the original."""
    given = predicted_maps(1, W, KEYS) if maps is None else maps
    found = verify_tiny(
        checkpoint("llama"), "genai", "fp32", tmp_path, tuple(given), mixer_of=given.__getitem__,
        exported=exported("llama"), prompts=False, written=written, damage=damage,
    )  # fmt: skip
    named = {(r.check, r.subject, r.metric) for r in found if not r.passed}
    assert not any(subject == "original" for _, subject, _ in named)
    return named
