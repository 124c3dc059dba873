"""What the package calls of TensorRT is in the library that is installed here."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import nbl_export.targets.tensorrt
from nbl_export.targets.tensorrt.library import load_library

from ..trt_tiny import RTX, needs_rtx

pytestmark = [pytest.mark.trt, needs_rtx]

HOME = Path(nbl_export.targets.tensorrt.__file__).parent
# Classes of the library by the names, without leading underscores, that the package gives to their objects.
CLASSES = {
    "builder": "Builder", "network": "INetworkDefinition", "net": "INetworkDefinition", "parser": "OnnxParser",
    "runtime": "Runtime", "engine": "ICudaEngine", "context": "IExecutionContext", "tensor": "ITensor",
    "runtime_config": "IRuntimeConfig", "builder_config": "IBuilderConfig", "cache": "IRuntimeCache",
}  # fmt: skip


def unknown(source: str, trt: ModuleType) -> Iterator[str]:
    """Attributes of the module, of its classes and of their objects that the library does not have."""
    for node in ast.walk(ast.parse(source)):
        owner = _owner(node.value, trt) if isinstance(node, ast.Attribute) else None
        if isinstance(node, ast.Attribute) and owner is not None and not hasattr(owner, node.attr):
            yield f"{node.lineno}: {ast.unparse(node)}"


def _owner(node: ast.expr, trt: ModuleType) -> object | None:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    name = name.lstrip("_")
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("trt"):
        found = getattr(trt, node.attr, None)
        return found if inspect.isclass(found) else None
    return trt if name == "trt" else getattr(trt, CLASSES[name]) if name in CLASSES else None


def test_every_name_is_in_the_library() -> None:
    trt = load_library(RTX)
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(HOME.glob("*.py"))}
    assert {name: found for name, text in sources.items() if (found := list(unknown(text, trt)))} == {}


@pytest.mark.parametrize("line", ["self._context.set_tensor_adress('x')", "trt.LayerTyp", "trt.LayerType.ATENTION"])
def test_a_misspelling_is_seen(line: str) -> None:
    assert len(list(unknown(line, load_library(RTX)))) == 1
