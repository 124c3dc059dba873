"""The structure that docs/architecture.md draws: levels, no cycles, stages apart, heavy libraries, names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbl_export.targets import all_targets

PACKAGE = Path(__file__).parent.parent / "nbl_export"
# A module of one place may import from places with a smaller number, and from its own.
LEVELS = {
    "version": 0, "errors": 0, "files": 1, "records": 1, "options": 2, "trust": 2, "child": 2,
    "text": 3, "graph": 3,
    "model": 4,
    "methods": 5,
    "run_directory": 6,
    "targets": 6,
    "measure": 7, "verify": 7, "evaluation": 7, "report": 7,
    "run": 8, "publish": 9, "api": 10, "cli": 10, "hf": 10, "__main__": 11, "": 11,
}  # fmt: skip
STAGES = ("measure", "verify", "evaluation", "report")
TARGETS = ("onnx", "openvino", "tensorrt", "checkpoint")  # packages of `targets`; its other ones serve all
# Library -> where it may be imported: a place, or a module of one.
HEAVY = {
    "torch": ("model", "methods",
              "text.parts", "text.retrieval", "text.windows", "verify.exporter",
              "targets.export", "targets.openvino.export", "targets.openvino.trace", "targets.tensorrt.export",
              "targets.checkpoint"),
    "transformers": ("model", "methods.checkpoint", "methods.predicted_kv.torch_layers",
                     "methods.predicted_kv.products", "targets.export", "targets.onnx.export_genai",
                     "targets.openvino.trace", "targets.tensorrt.export", "targets.checkpoint"),
    "vllm": ("targets.checkpoint.vllm",),
    "tensorrt_edgellm": ("targets.checkpoint.edge_llm_code",),
    "onnx_ir": ("graph", "methods", "targets.export", "targets.onnx", "targets.tensorrt"),
    "onnxruntime": ("graph.session", "targets", "graph.passes.quantize"),
    "onnxruntime_genai": ("targets.onnx",),
    "tensorrt": ("targets.tensorrt",),
    "tensorrt_rtx": ("targets.tensorrt",),
    "pynvml": ("measure.clocks",),
    "lm_eval": ("evaluation",),
    "openvino": ("graph.ir", "methods.linear.ir", "methods.linear.ir_parts", "methods.predicted_kv.ir",
                 "methods.predicted_kv.ir_reference", "targets.openvino"),
    "openvino_tokenizers": ("targets.openvino",),
    "gguf": ("model",),
    "nncf": ("targets.openvino",),
    "datasets": ("evaluation", "text.hub"),
    "rich": ("report", "run.progress", "trust.terminal", "cli"),
    "matplotlib": ("report.plots",),
}  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(name: str) -> Iterator[str]:
    """Modules that a module imports anywhere in it: ours without "nbl_export.", others by their full name."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (_ours(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield _ours(full if _ours(full) in MODULES else str(node.module))


def _ours(module: str) -> str:
    return module.removeprefix("nbl_export.") if module.startswith("nbl_export.") else module


EDGES = {name: {m for m in imported(name) if m in MODULES and m != name} for name in MODULES}


def place(name: str) -> str:
    return name.split(".")[0]


def between_places() -> list[tuple[str, str]]:
    return [(a, b) for a, others in EDGES.items() for b in others if place(a) != place(b)]


def arrows_up() -> list[str]:
    """Imports that do not go to a lower level."""
    return [f"{a} imports {b}" for a, b in between_places() if LEVELS[place(b)] >= LEVELS[place(a)]]


def test_imports_go_down() -> None:
    assert len(between_places()) > 500
    assert arrows_up() == []


def circles() -> list[str]:
    """Files that import each other, as a walk through all imports meets them."""
    state: dict[str, int] = {}
    found = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        state[name] = 1
        for other in sorted(EDGES[name]):
            if state.get(other) == 1:
                found.append(" -> ".join((*path[path.index(other) :], other)))
            elif other not in state:
                visit(other, (*path, other))
        state[name] = 2

    for name in EDGES:
        if name not in state:
            visit(name, (name,))
    return found


def test_no_cycles() -> None:
    assert circles() == []


def test_stages_do_not_import_each_other() -> None:
    pairs = {(place(a), place(b)) for a, others in EDGES.items() for b in others}
    assert {(a, b) for a, b in pairs if a != b and a in STAGES and b in STAGES} == set()


def target(name: str) -> str:
    """The package of a target that a module is in; "" elsewhere, and in what serves all targets."""
    parts = name.split(".")
    return parts[1] if parts[0] == "targets" and len(parts) > 1 and parts[1] in TARGETS else ""


def test_targets_do_not_import_each_other() -> None:
    assert all(f"targets.{name}" in MODULES for name in TARGETS)
    found = [f"{a} imports {b}" for a, others in EDGES.items() for b in others if target(b) and target(a)]
    assert len(found) > 40
    assert [line for line in found if target(line.split(" ")[0]) != target(line.split(" ")[2])] == []


def test_only_publish_and_doors_know_runs() -> None:
    for name in MODULES:
        if any(place(other) == "run" for other in EDGES[name]):
            assert place(name) in ("run", "publish", "api", "cli"), name


def test_heavy_libraries_stay_in_their_place() -> None:
    used = {(name, module.split(".")[0]) for name in MODULES for module in imported(name)}
    assert {library for _, library in used} >= set(HEAVY) - {"tensorrt", "tensorrt_rtx"}  # these by their name
    assert [f"{name} imports {library}" for name, library in sorted(used) if not is_at_home(library, name)] == []


def is_at_home(library: str, name: str) -> bool:
    homes: tuple[str, ...] = HEAVY.get(library, (name,))
    return any(name == home or name.startswith(f"{home}.") for home in homes)


# Modules that may say an engine's name beside the texts of options: names of packages, of tools that read a form, and
# of a decoder source.
NAME_ENGINES = {
    name: {"openvino"} for name in ("run_directory", "graph.ir.files", "graph.ir.session", "model.architectures")
}
_ENGINE_TEXTS = ("options.options", "records.destinations")  # the default of --engine and help; where models are served


def test_only_targets_know_engines() -> None:
    names = {target.capabilities.name for target in all_targets()}
    assert len(names) == 4
    said = [
        (module, node.lineno, node.value)
        for module, tree in TREES.items()
        if place(module) != "targets" and module not in _ENGINE_TEXTS
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in names
    ]
    found = [f"{m}:{line} asks for {name}" for m, line, name in said if name not in NAME_ENGINES.get(m, ())]
    assert found == []


FILE_NAMES = (
    "nbl.json", "verify.json", "bench.json", "eval.json", "report.json", "report.html", "report.md",
    "distill.json", "maps.safetensors", "sums.safetensors", "model.onnx", "all_logits.onnx", "decoder.onnx",
    "genai_config.json", "openvino_model.xml", "openvino_model.bin", "acceptance-values.json", "acceptance.json",
)  # fmt: skip
NAMING = ("run_directory", "graph.names")


def test_names_of_files_are_said_in_one_place() -> None:
    said = [(m, n.lineno, n.value) for m, tree in TREES.items() for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    found = [f"{m}:{line} names {value}" for m, line, value in said if value in FILE_NAMES and m not in NAMING]
    assert found == []


@pytest.mark.process
def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai", "matplotlib",
             "tensorrt_rtx", "lm_eval", "openvino", "nncf")  # fmt: skip
    code = f"import sys, nbl_export, nbl_export.cli.app; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_of_the_architecture_has_these_levels() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    found: dict[str, int] = {}
    for names, level in re.findall(r"^\| (`[^|]*`) \| (\d+) \|", page, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"`(\w+)(?:\.py|/)`", names), int(level))
    assert found == {name: level for name, level in LEVELS.items() if name not in ("__main__", "")}


def test_the_page_of_the_architecture_has_these_libraries() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("| library |") :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {library: tuple(re.findall("`(.*?)`", homes)) for library, homes in cells} == HEAVY
