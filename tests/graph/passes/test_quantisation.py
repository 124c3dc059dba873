"""How the graph's matrices and the maps are quantised: what builder_option does, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command import assert_refused, configured, nbl
from tests.jobs import until

pytestmark = pytest.mark.job

Same = tuple[object, ...]


def nodes(run: Path, which: str) -> list[Any]:
    graph = onnx.load(str(run / which / "model.onnx"), load_external_data=False).graph
    return [n for n in graph.node if n.op_type in ("MatMulNBits", "MatMul")]


def settings(node: Any) -> dict[str, int]:
    return {a.name: a.i for a in node.attribute}


@pytest.mark.parametrize(
    ("given", "expected", "zero_points"),
    [
        (("block_size=64", "accuracy_level=1"), {"block_size": 64, "accuracy_level": 1}, True),
        (("algo_config=k_quant",), {"block_size": 32}, True),
        (("algo_config=rtn",), {"block_size": 32}, False),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, tuple) else "",
)
def test_builder_options_reach_matrices_and_maps(
    given: tuple[str, ...], expected: dict[str, int], zero_points: bool, same: Same, tmp_path: Path
) -> None:
    """Blocks of 64 do not divide a hidden size of 96: the embedding, which the head shares, has rows of 128."""
    words = configured(builder_option=given)
    with until("verify"):
        done = nbl(*same, "--precision", "int4", *words, "--output", tmp_path / "run")
    assert done.status == 0, done.err  # verified: the maps are read back out of what was packed
    packed = [n for n in nodes(tmp_path / "run", "model") if n.op_type == "MatMulNBits"]
    ours = [n for n in packed if n.name.startswith("/nbl/")]
    assert ours
    for node in (packed[0], *ours):
        assert expected.items() <= settings(node).items()
        assert (len(node.input) > 3 and node.input[3] != "") == zero_points
    command = json.loads((tmp_path / "run" / "nbl.json").read_text(encoding="utf-8"))["command"]
    assert all(f'"{option}"' in command for option in given)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"builder_option": "speed=high"}, ("key builder_option speed=high", "block_size", "algo_config")),
        ({"builder_option": "hf_remote=true"}, ("key builder_option hf_remote=true", "KEY=VALUE")),
        ({"builder_option": "block_size", "precision": "int4"}, ("key builder_option block_size", "16, 32")),
        ({"builder_option": "block_size=33", "precision": "int4"}, ("block_size=33", "16, 32")),
        ({"builder_option": ["block_size=32", "block_size=64"], "precision": "int4"}, ("block_size", "twice")),
        ({"builder_option": "block_size=32", "decoder_source": "mobius"}, ("decoder_source genai",)),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    given: dict[str, Any], parts: tuple[str, ...], same: Same, tmp_path: Path
) -> None:
    refused = nbl(*same, *configured(**given), "--output", tmp_path / "run")
    assert_refused(refused, 2, *parts)
    assert not (tmp_path / "run").exists()
