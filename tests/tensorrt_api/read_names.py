"""Writes names.json: what the Python bindings of TensorRT and TensorRT-RTX offer, by version.

    python -m tests.tensorrt_api.read_names         needs pip, a C compiler and Python 3.11

pip downloads the wheels of the bindings, which any machine can have; the libraries behind them come from NVIDIA's own
index. An empty library (`empty_library.c`) takes the place of the libraries, and `ask` reads the bindings. The test of
the marker `bindings` does the same and compares; other tests read names.json alone.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["BINDINGS", "NAMES_FILE", "missing_tool", "read_all", "written"]

HERE = Path(__file__).parent
NAMES_FILE = HERE / "names.json"
# One letter each. The oldest that the extra `trt` admits, two between, and the one that `trt-rtx` installs.
BINDINGS = {
    "a": "tensorrt-cu13-bindings==10.15.1.29",
    "b": "tensorrt-cu13-bindings==10.16.1.11",
    "c": "tensorrt-cu13-bindings==11.4.0.106",
    "r": "tensorrt-rtx-cu13-bindings==1.7.1.116",
}
CLASSES = (
    "Builder", "BuilderFlag", "ComputeCapability", "CudaGraphStrategy", "DataType",
    "DynamicShapesKernelSpecializationStrategy", "ElementWiseOperation", "EngineInspector",
    "ExecutionContextAllocationStrategy", "IAttention", "IAttentionInputLayer", "IBuilderConfig", "IConstantLayer",
    "ICudaEngine", "IElementWiseLayer", "IExecutionContext", "IHostMemory", "ILayer", "ILogger", "INetworkDefinition",
    "IOptimizationProfile", "IProgressMonitor", "IRuntimeCache", "IRuntimeConfig", "ISerializationConfig",
    "IStreamReaderV2", "IStreamWriter", "ITensor", "ITimingCache", "LayerInformationFormat", "LayerType",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser",
    "OnnxParserFlag", "ParserError", "ProfilingVerbosity", "Runtime",
)  # fmt: skip
_LIBRARY = re.compile(rb"lib(?:nvinfer|nvonnxparser|tensorrt)\w*\.so\.\d+")


def missing_tool() -> str:
    """What this machine lacks for reading the bindings, or ""."""
    if _python() is None:
        return "there is no Python 3.11, which the wheels are for"
    return "" if shutil.which("cc") else "there is no C compiler cc"


def _python() -> str | None:
    return sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")


def read_all() -> dict[str, Any]:
    """The value of names.json, from the wheels.

    Raises:
        subprocess.CalledProcessError: pip, the compiler or the bindings fail.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _merged({letter: _read(wheel, Path(scratch) / letter) for letter, wheel in BINDINGS.items()})


def _read(requirement: str, scratch: Path) -> dict[str, Any]:
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
    subprocess.run([*pip, "--python-version", "3.11", "--dest", scratch / "wheel", requirement], check=True)
    (wheel,) = (scratch / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    (bindings,) = scratch.glob("*_bindings/*.so")
    empty = scratch / "empty.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", empty, HERE / "empty_library.c", "-lstdc++"], check=True)
    for name in set(_LIBRARY.findall(bindings.read_bytes())):
        (scratch / name.decode()).symlink_to(empty)
    ask = (str(_python()), "-I", "-S", "-W", "ignore", HERE / "ask.py", scratch, bindings.parent.name, empty)
    environment = {"LD_LIBRARY_PATH": str(scratch)}
    done = subprocess.run([*ask, *CLASSES], check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _merged(read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One value of all bindings: what is equal stands once, behind the letters of the bindings that have it."""
    names: dict[str, str] = defaultdict(str)
    members: dict[str, dict[str, dict[str, str]]] = {cls: {} for cls in CLASSES}
    for letter, found in read.items():
        for name in found["names"]:
            names[name] += letter
        for cls, offered in found["classes"].items():
            for member, text in offered.items():
                had = members[cls].setdefault(member, {})
                letters = next((k for k, v in had.items() if v == text), "")
                had.pop(letters, None)
                had[letters + letter] = text
    together: dict[str, list[str]] = defaultdict(list)
    for name, letters in sorted(names.items()):
        together[letters].append(name)
    listed = {letters: " ".join(found) for letters, found in sorted(together.items())}
    return {"bindings": BINDINGS, "names": listed, "classes": members}


def written(value: dict[str, Any]) -> str:
    """The text of names.json: a line for each member of a class."""
    lines = [
        f'{{"bindings": {json.dumps(value["bindings"], indent=1)},',
        f'"names": {json.dumps(value["names"], indent=1)},',
    ]
    classes = []
    for cls, members in value["classes"].items():
        rows = [f"  {json.dumps(m)}: {json.dumps(members[m])}" for m in sorted(members)]
        classes.append(f" {json.dumps(cls)}: {{\n" + ",\n".join(rows) + "\n }")
    return "\n".join([*lines, '"classes": {', ",\n".join(classes), "}}"]) + "\n"


if __name__ == "__main__":
    NAMES_FILE.write_text(written(read_all()), encoding="utf-8")
