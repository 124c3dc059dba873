"""The rewritten graphs are those in graphs/, line by line."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

RENDER = Path(__file__).parent.parent / "graphs" / "render.py"


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nbl_graphs_render", RENDER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rendered(render: ModuleType) -> dict[str, str]:
    texts: dict[str, str] = render.render_all()
    return texts


def test_golden_text(render: ModuleType, rendered: dict[str, str]) -> None:
    compared, other = 0, set()
    for name, text in rendered.items():
        golden = (RENDER.parent / name).read_text(encoding="utf-8")
        if golden.splitlines()[0] != text.splitlines()[0]:
            other.add(f"{name} was made with {golden.splitlines()[0][2:]}, installed is {text.splitlines()[0][2:]}")
            continue
        compared += 1
        change = list(difflib.unified_diff(golden.splitlines(), text.splitlines(), name, "now", lineterm="", n=1))
        assert not change, "graph changed; if it should have, run: python graphs/render.py\n" + "\n".join(change)
    if not compared:
        pytest.skip("other exporter versions than the golden text's: " + "; ".join(sorted(other)))


def test_no_stale_golden_files(rendered: dict[str, str]) -> None:
    assert {p.name for p in RENDER.parent.glob("*.txt")} == set(rendered)


def test_bypass_costs_two_nodes_and_saves_the_block(rendered: dict[str, str]) -> None:
    """GenAI graph: norm+qkv+attention+o_proj go (the norm's residual sum stays as Add), MatMul and Add come."""
    before, after = (rendered[f"llama-genai-{v}.txt"].splitlines() for v in ("original", "nbl"))

    def count(lines: list[str], op: str) -> int:
        return sum(line.startswith(f"{op}(") for line in lines)

    assert count(before, "GroupQueryAttention") - count(after, "GroupQueryAttention") == 1
    assert count(before, "MatMul") - count(after, "MatMul") == 1  # qkv and o_proj out, the map in
    assert count(after, "Add") - count(before, "Add") == 2  # the bias, and the residual sum of the unread norm
    assert count(before, "SkipSimplifiedLayerNormalization") - count(after, "SkipSimplifiedLayerNormalization") == 1
    assert len(before) - len(after) == 1 + 2 + 2  # one node fewer, two cache inputs and two outputs
