"""An exit layer in the static form computes what torch serves, in steps around W, behind each other and in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.errors import RefusalError
from nbl_export.graph.passes.tail import difference, keep_last_token
from nbl_export.methods.applied import linearize
from nbl_export.methods.checkpoint.load import load_model
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.rewrite import rewrite
from nbl_export.targets.tensorrt import export as static
from tests.exits import predicted_maps
from tests.static_tiny import HEAD, HIDDEN, LAYERS, TOLERANCE, open_decoder, rows, worst

pytestmark = pytest.mark.engine

W = 8
# Prompts around W + 1 tokens, later steps of several sizes, and single tokens.
STEPS = [[W + 1, 1, W + 2, 1, W], [3 * W + 5, 1, 2 * W + 3, 1, 1], [1, W + 4, W + 2, W + 1]]

Form = Callable[[str], ir.Model]
Tiny = Callable[[str], Path]


def maps_at(exit_layer: int) -> dict[int, PredictedKV]:
    return predicted_maps(exit_layer, W, 2 * HEAD, HIDDEN, LAYERS)


@pytest.fixture(scope="module")
def graph(form: Form, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """(architecture, exit layer) -> directory with both graphs"""

    def make(architecture: str, exit_layer: int) -> Path:
        root = tmp_path_factory.mktemp("exit")
        static.save_graph(form(architecture), root / "original")
        rewrite(root / "original", root / "nbl", maps_at(exit_layer))
        keep_last_token(root / "nbl")
        return root / "nbl"

    return make


def served(
    tiny: Tiny, architecture: str, exit_layer: int, row: Sequence[int], sizes: Sequence[int]
) -> list[np.ndarray]:
    """Torch's logits of each step of one sequence; NaN for tokens that stop."""
    from transformers import DynamicCache

    model, cache, found = linearize(load_model(tiny(architecture)), maps_at(exit_layer)), DynamicCache(), []
    with torch.inference_mode():
        for end in np.cumsum(sizes):
            ids = torch.tensor([row[cache.get_seq_length() : end]])
            found.append(model(ids, past_key_values=cache, use_cache=True).logits[0].numpy())
    return found


def test_maps_of_another_width_are_refused(form: Form, tmp_path: Path) -> None:
    static.save_graph(form("llama"), tmp_path / "original")
    with pytest.raises(RefusalError, match=f"layer 1: its map predicts keys {HEAD} wide"):
        rewrite(tmp_path / "original", tmp_path / "nbl", predicted_maps(1, W, HEAD, HIDDEN, LAYERS))


@pytest.mark.parametrize(("architecture", "exit_layer"), [("llama", 1), ("mistral", 2), ("llama", 0)])
def test_steps_are_those_of_torch(
    architecture: str, exit_layer: int, graph: Callable[[str, int], Path], tiny: Tiny
) -> None:
    """All logits and the last ones; a step of at most W + 1 tokens has no row that stops."""
    out = graph(architecture, exit_layer)
    every, last = open_decoder(out / "all_logits.onnx"), open_decoder(out / "decoder.onnx")
    assert last.contract.logits == "last" and not difference(out)
    for sizes in STEPS:
        right, start = served(tiny, architecture, exit_layer, rows()[0], sizes), 0
        for decoder in (every, last):
            decoder.begin(1)
        for size, expected in zip(sizes, right, strict=True):
            ids = np.array([rows()[0][start : start + size]])
            found, end = every.step(ids)[0], last.step(ids)[0]
            computed = ~np.isnan(found).any(1)
            assert computed.sum() == min(size, W + 1) and (computed == ~np.isnan(expected).any(1)).all()
            assert worst(found[computed], expected[computed]) < TOLERANCE["fp32"], sizes
            assert worst(end, expected[-1:]) < TOLERANCE["fp32"], sizes
            start += size


def test_each_sequence_of_a_batch_continues_by_its_own_length(graph: Callable[[str, int], Path], tiny: Tiny) -> None:
    """A long one, one of W + 1 tokens and one that rests; then chunks of a runner's size and single tokens."""
    counts, chunk = ([[3 * W, W + 1], [W + 3, 0], [1, 1], [2 * W, W + 5], [1, 1]], 2 * W + 1)
    decoder = open_decoder(graph("llama", 1) / "decoder.onnx", chunk)
    decoder.begin(2)
    right = []
    for row, every in enumerate(zip(*counts, strict=True)):
        parts = [[min(chunk, n - k) for k in range(0, n, chunk)] for n in every]
        logits = iter(served(tiny, "llama", 1, rows()[row], [n for part in parts for n in part]))
        right.append([[next(logits)[-1] for _ in part] for part in parts])
    starts = [0, 0]
    for step, both in enumerate(counts):
        ids, valid = np.zeros((2, max(both)), int), np.zeros((2, max(both)), int)
        for row, count in enumerate(both):
            ids[row, :count], valid[row, :count] = rows()[row][starts[row] : starts[row] + count], 1
            starts[row] += count
        found = decoder.step(ids, valid)
        for row, count in enumerate(both):
            assert not count or worst(found[row, 0], right[row][step][-1]) < TOLERANCE["fp32"], (step, row)


def positions_of_other_rows(nodes: dict[str, ir.Node]) -> None:
    """Masks and rotary tables of the first M rows in place of those of the rows that continue."""
    own = nodes["/nbl/exit/own_positions"]
    moved = ir.node("Sub", [nodes["/nbl/exit/places"].outputs[0], nodes["/nbl/exit/shifted"].outputs[0]])
    own.prepend(moved)
    own.replace_input_with(1, moved.outputs[0])


def one_row_later(nodes: dict[str, ir.Node]) -> None:
    before = nodes["/nbl/exit/before"]
    for index in (1, 2):
        before.replace_input_with(index, nodes["/nbl/exit/skipped"].inputs[index])


def own_keys_only(nodes: dict[str, ir.Node]) -> None:
    nodes["/nbl/exit/source"].replace_input_with(1, nodes["/nbl/exit/source"].inputs[2])


@pytest.mark.parametrize("fault", [positions_of_other_rows, one_row_later, own_keys_only])
def test_a_fault_shows(
    fault: Callable[[dict[str, ir.Node]], None], graph: Callable[[str, int], Path], tiny: Tiny
) -> None:
    path = graph("llama", 1) / "decoder.onnx"
    model = ir.load(path)
    fault({str(node.name): node for node in model.graph})
    ir.save(model, path)
    decoder, row = open_decoder(path), rows()[0]
    decoder.begin(1)
    found = decoder.step(np.array([row[: 3 * W]]))[0]
    assert worst(found, served(tiny, "llama", 1, row, [3 * W])[0][-1:]) > 100 * TOLERANCE["fp32"]
