"""Who may import what: stages do not import each other, engines load without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nbl_export"
FILES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))

TORCH = {
    "checkpoint", "corpus", "sums", "moments_file", "distributed", "layerwise", "calibrate", "lmmse", "linearize",
    "distill", "distill_model", "reference", "sampling", "hf", "switched", "greedy", "methods", "blocks", "narrow",
    "short_attention", "graph_moments", "token_rows", "pretrained", "wire",
}  # fmt: skip
ONNX_IR = ("decoders/", "rewrite/", "int4_blocks.py")
ORT = ("engines/", "decoders/genai", "rewrite/quantize.py")  # quantize: ONNX Runtime's packing is a library call
HARNESS = ("evaluation/",)  # lm-evaluation-harness and its data sets; corpus reads calibration text from the hub too
STAGES = {"calibrate", "plan", "linearize", "decoders", "rewrite", "verify", "evaluation", "bench", "report"}
COMPOSERS = {"cli.py", "pipeline.py", "stages.py", "job.py", "verification.py", "evaluation_job.py",
             "graph_verification.py"}  # fmt: skip


def imports(name: str, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; without `everywhere` only at its top level and outside TYPE_CHECKING."""
    tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(name: str) -> set[str]:
    return {module.split(".")[0] for module in imports(name)}


@pytest.mark.parametrize("name", FILES)
def test_heavy_libraries_stay_in_their_place(name: str) -> None:
    stem = name.removesuffix(".py")
    found = roots(name)
    if stem not in TORCH and not name.startswith("decoders/") and name != "engines/trt_runner.py":
        assert not found & {"torch", "transformers"}
    if not name.startswith(ONNX_IR):
        assert "onnx_ir" not in found
    if not name.startswith(ORT):
        assert not found & {"onnxruntime", "onnxruntime_genai"}
    if not name.startswith(HARNESS):
        assert "lm_eval" not in found
        assert "datasets" not in found or name == "corpus.py"
    if not name.startswith("engines/"):
        assert not found & {"tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize("name", FILES)
def test_stages_do_not_import_each_other(name: str) -> None:
    own = name.split("/")[0].removesuffix(".py")
    if name in COMPOSERS or own not in STAGES:
        return
    others = {m.split(".")[1] for m in imports(name) if m.startswith("nbl_export.") and m.count(".") >= 1}
    allowed = {"calibrate": {"lmmse"}, "verify": set()}.get(own, set())
    assert not (others & STAGES) - {own} - allowed


def test_composers_import_stages_where_they_run_them() -> None:
    for name in ("cli.py", "pipeline.py"):
        top = {m.split(".")[1] for m in imports(name, everywhere=False) if m.startswith("nbl_export.")}
        assert not top & (STAGES - {"plan"})


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "transformers",
        "onnx",
        "onnx_ir",
        "onnxruntime",
        "onnxruntime_genai",
        "matplotlib",
        "tensorrt_rtx",
        "lm_eval",
    )
    code = f"import sys, nbl_export, nbl_export.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
