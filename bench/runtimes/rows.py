"""Every runtime that is tried: what it is called, what it is given, and the command that runs it here.

A command is a program of this folder. It prints one line of JSON as its last: `version`, `tokens`, and `prompt_ids`
where the runtime has a tokenizer. A runtime that is not installed says what is missing instead (`Missing`).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ROWS", "Missing", "Place", "Row"]

HERE = Path(__file__).parent
MODEL, LAYOUT = "model/ as it is", "bench/runtimes/layout.py"


class Missing(Exception):
    """A runtime is not here; the text says what to install."""


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        model: the model folder as nbl-export left it.
        layout: the same for transformers.js.
        scratch: for what has to be built.
        optimum_python: an interpreter with optimum-onnx, or None.
        screenshot: where the browser page's picture goes, or None.
    """

    model: Path
    layout: Path
    scratch: Path
    optimum_python: str | None = None
    screenshot: Path | None = None


Asked = Mapping[str, object]


@dataclass(frozen=True)
class Row:
    """A runtime; `command` gives arguments, and raises `Missing` where it cannot be run."""

    name: str
    given: str
    command: Callable[[Place, Asked], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    version: Callable[[], str] | None = None


def _python(script: str, package: str) -> Callable[[Place, Asked], list[str]]:
    def command(place: Place, asked: Asked) -> list[str]:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"the package {package} is not installed")
        return [sys.executable, str(HERE / script), str(place.model), json.dumps(asked)]

    return command


def _optimum(place: Place, asked: Asked) -> list[str]:
    if place.optimum_python is None:
        raise Missing("give --optimum-python, an environment made from bench/runtimes/optimum.txt")
    return [place.optimum_python, str(HERE / "optimum_onnx.py"), str(place.model), json.dumps(asked)]


def _node(script: str, package: str, *, layout: bool = False) -> Callable[[Place, Asked], list[str]]:
    def command(place: Place, asked: Asked) -> list[str]:
        directory = place.layout if layout else place.model
        return [_node_with(package), str(HERE / script), str(directory), json.dumps(asked)]

    return command


def _page(page: str, package: str, *, layout: bool = False) -> Callable[[Place, Asked], list[str]]:
    def command(place: Place, asked: Asked) -> list[str]:
        node = _node_with(package, "playwright-core")
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        if chromium is None:
            raise Missing("Chromium is not installed")
        extra = {"chromium": chromium, "screenshot": str(place.screenshot) if layout and place.screenshot else None}
        directory = place.layout if layout else place.model
        return [node, str(HERE / "browser.mjs"), page, str(directory), json.dumps({**asked, **extra})]

    return command


def _node_with(*packages: str) -> str:
    node = shutil.which("node")
    if node is None:
        raise Missing("Node is not installed")
    for package in packages:
        if not (HERE / "node_modules" / package).is_dir():
            raise Missing(f"the npm package {package} is not installed: npm ci in bench/runtimes")
    return node


def _c(place: Place, asked: Asked) -> list[str]:
    compiler, library = shutil.which("cc"), _folder("onnxruntime_genai")
    if compiler is None:
        raise Missing("no C compiler")
    program = place.scratch / "genai_c"
    linked = [f"-L{library}", "-lonnxruntime-genai", f"-Wl,-rpath,{library}"]
    subprocess.run([compiler, "-Wall", "-Wextra", str(HERE / "genai_c.c"), "-o", str(program), *linked], check=True)
    ids = asked["ids"]
    assert isinstance(ids, list)
    return [str(program), str(place.model), str(asked["new_tokens"]), *map(str, ids)]


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Missing(f"the package {package} is not installed")
    return Path(spec.origin).parent


def _onnxruntime_library() -> dict[str, str]:
    """GenAI's library looks for ONNX Runtime's there."""
    found = sorted((_folder("onnxruntime") / "capi").glob("libonnxruntime.so*")) if _installed("onnxruntime") else []
    return {"ORT_LIB_PATH": str(found[0])} if found else {}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _genai_version() -> str:
    from importlib.metadata import version

    return f"{version('onnxruntime-genai')}, onnxruntime {version('onnxruntime')}"


def _csharp(place: Place, asked: Asked) -> list[str]:
    raise Missing("no .NET here; its binding calls the C interface of the row before")


ROWS = (
    Row("ONNX Runtime, Python, a loop by hand", MODEL, _python("plain_ort.py", "onnxruntime")),
    Row("ONNX Runtime GenAI, Python", MODEL, _python("genai.py", "onnxruntime_genai")),
    Row("ONNX Runtime GenAI, C", MODEL, _c, _onnxruntime_library(), _genai_version),
    Row("ONNX Runtime GenAI, C#", MODEL, _csharp),
    Row("optimum-onnx ORTModelForCausalLM", MODEL, _optimum, {"HF_HUB_OFFLINE": "1"}),
    Row("onnxruntime-node", MODEL, _node("node_ort.mjs", "onnxruntime-node")),
    Row("transformers.js, Node", LAYOUT, _node("node_transformers.mjs", "@huggingface/transformers", layout=True)),
    Row("onnxruntime-web, Chromium, WebAssembly", MODEL, _page("ort_web.html", "onnxruntime-web")),
    Row(
        "transformers.js, Chromium, WebAssembly, streamed",
        LAYOUT,
        _page("transformers_web.html", "@huggingface/transformers", layout=True),
    ),
)
