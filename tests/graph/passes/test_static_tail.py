"""The pruned tail of the static form: the logits of every row's last valid token, and two faults that show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.graph.names import ALL_LOGITS_FILE
from nbl_export.graph.passes.tail import difference, keep_last_token
from nbl_export.methods.rewrite import rewrite
from nbl_export.targets.tensorrt import export as static
from nbl_export.verify.ladder import TOLERANCES
from nbl_export.verify.last_token import check_last, expected_last
from tests.static_tiny import TOLERANCE, VOCAB, maps_of, open_decoder, rows, single_row_error, torch_logits, worst

pytestmark = pytest.mark.engine

Form = Callable[[str], ir.Model]


def pruned(model: ir.Model, replaced: tuple[int, ...], directory: Path) -> Path:
    """The directory of what ships for a plan."""
    original = directory / "original"
    static.save_graph(model, original)
    keep_last_token(original)
    rewrite(original, directory / "model", maps_of(replaced))
    return directory / "model"


@pytest.mark.parametrize("replaced", [(), (1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_pruned_tails_give_the_logits_of_the_last_valid_token(
    architecture: str, replaced: tuple[int, ...], form: Form, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """A chunk of 7 after a cache of 13, a batch of lengths 1, 5 and 12, single tokens after both; 8 tokens a step."""
    path = pruned(form(architecture), replaced, tmp_path) / "decoder.onnx"
    expected = torch_logits(tiny(architecture), maps_of(replaced))
    assert single_row_error(path, expected[0], [13, 7, 1, 1, 1], chunk=8) < TOLERANCE["fp32"]
    decoder, taken, lengths = open_decoder(path, chunk=8), (0, 1, 0), [1, 5, 12]
    decoder.begin(3)
    ids, valid = np.zeros((3, 12), int), np.zeros((3, 12), int)
    for b, (row, n) in enumerate(zip(taken, lengths, strict=True)):
        ids[b, :n], valid[b, :n] = rows()[row][:n], 1
    for _ in range(3):
        got = decoder.step(ids, valid)
        assert got.shape == (3, 1, VOCAB)
        right = np.stack([expected[row][n - 1] for row, n in zip(taken, lengths, strict=True)])
        assert worst(got[:, 0], right) < TOLERANCE["fp32"]
        ids = np.array([[rows()[row][n]] for row, n in zip(taken, lengths, strict=True)])
        valid, lengths = np.ones((3, 1), int), [n + 1 for n in lengths]


def past_the_end(graph: dict[str, ir.Node]) -> None:
    graph["/nbl/tail/found"].replace_input_with(0, graph["/nbl/tail/last"].inputs[0])


def attention_alone(graph: dict[str, ir.Node]) -> None:
    gather = graph["/nbl/tail/residual"]
    assert gather.inputs[0] is not None
    gather.outputs[0].replace_all_uses_with(gather.inputs[0])


@pytest.mark.parametrize("fault", [past_the_end, attention_alone])
def test_a_wrong_token_shows(fault: Callable[[dict[str, ir.Node]], None], form: Form, tmp_path: Path) -> None:
    directory = pruned(form("mistral"), (2,), tmp_path)
    path, every = directory / "decoder.onnx", open_decoder(directory / ALL_LOGITS_FILE, 8)
    expected = expected_last(every, rows()[0], TOLERANCES["fp32"].limit)
    passed = [r.passed for r in check_last("nbl", expected, open_decoder(path, 8), rows()[0])]
    assert passed == [True] * 3
    model = ir.load(path)
    fault({str(node.name): node for node in model.graph})
    ir.save(model, path)
    passed = [r.passed for r in check_last("nbl", expected, open_decoder(path, 8), rows()[0])]
    assert passed == [False] * 3
    assert difference(directory)
