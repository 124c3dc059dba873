"""The rewritten graphs are those in graphs/, line by line."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RENDER = Path(__file__).parent.parent / "graphs" / "render.py"
_SPEC = importlib.util.spec_from_file_location("nbl_graphs_render", RENDER)
assert _SPEC is not None and _SPEC.loader is not None
render: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(render)


@pytest.fixture(scope="module")
def rendered(exported: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """case -> its texts; the static form has caches of its own size."""

    def make(case: tuple[str, str, str]) -> dict[str, str]:
        scratch = tmp_path_factory.mktemp("rendered")
        original = render.export_case(case, scratch) if case[1] == "static" else exported(*case)
        found: dict[str, str] = render.render_case(case, original, scratch)
        return found

    return make


def _param(case: tuple[str, str, str]) -> Any:
    return pytest.param(case, id="-".join(case), marks=pytest.mark.engine if case[1] in ("openvino", "static") else ())


@pytest.mark.parametrize("case", map(_param, render.CASES))
def test_golden_text(case: tuple[str, str, str], rendered: Callable[..., dict[str, str]]) -> None:
    if case[1] == "openvino":
        pytest.importorskip("openvino")
    for name, text in rendered(case).items():
        golden = (RENDER.parent / name).read_text(encoding="utf-8")
        if golden.splitlines()[0] != text.splitlines()[0]:
            made, installed = golden.splitlines()[0][2:], text.splitlines()[0][2:]
            pytest.skip(f"{name} was made with {made}, installed is {installed}")
        change = list(difflib.unified_diff(golden.splitlines(), text.splitlines(), name, "now", lineterm="", n=1))
        assert not change, "graph changed; if it should have, run: python graphs/render.py\n" + "\n".join(change)


def test_no_stale_golden_files() -> None:
    expected = {name for case in render.CASES for name in render.file_names(case)}
    assert {path.name for path in RENDER.parent.glob("*.txt")} == expected
