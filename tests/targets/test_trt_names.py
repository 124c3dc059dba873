"""What the package uses of TensorRT is in the bindings of every version that it may meet, read from names.json."""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nbl_export.targets.tensorrt
from nbl_export.targets.tensorrt.library import load_library

from ..tensorrt_api.held import Impossible, held
from ..tensorrt_api.names import ALL, RTX_ONLY, TRT_ONLY, has_name, member, members_of
from ..tensorrt_api.read_names import BINDINGS, CLASSES, NAMES_FILE, missing_tool, read_all, written
from ..tensorrt_api.uses import KNOWN, MODULE, Use, uses_of
from ..trt_tiny import RTX, needs_rtx

pytestmark = pytest.mark.trt

HOME = Path(nbl_export.targets.tensorrt.__file__).parent
FILES = sorted(HOME.glob("*.py"))  # its packages are of graphs and steps, and know no library
# What TensorRT-RTX alone has. The package reaches it behind the fields `default_targets` and `runtime_graphs`.
RTX_MODULE = {"ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache"}
RTX_MEMBERS = {
    ("IBuilderConfig", "num_compute_capabilities"), ("IBuilderConfig", "set_compute_capability"),
    ("IRuntimeConfig", "cuda_graph_strategy"), ("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy"),
    ("IRuntimeConfig", "create_runtime_cache"), ("IRuntimeConfig", "set_runtime_cache"),
    ("IRuntimeConfig", "get_runtime_cache"), ("IExecutionContext", "is_stream_capturable"),
    ("BuilderFlag", "REQUIRE_USER_ALLOCATION"),
}  # fmt: skip
# Parameters that may be anything, and are no objects of the library.
OTHER = {"answer", "arguments", "config", "function", "monitor", "plan", "severity", "stream", "writer"}


def problem(use: Use) -> str:
    """What is wrong with a use; "" if all bindings have it."""
    if use.owner == MODULE:
        letters = RTX_ONLY if use.name in RTX_MODULE else ALL
        return "" if has_name(use.name, letters) else f"no {use.name}"
    letters = RTX_ONLY if use.owner in RTX_MODULE or (use.owner, use.name) in RTX_MEMBERS else ALL
    found = member(use.owner, use.name, letters)
    where = f"{use.owner}.{use.name}"
    if found is None:
        return f"no {where}"
    if where == "IStreamWriter.write":  # the bindings' text has a pointer and a size; they pass bytes
        return ""
    if use.kind == "set":
        return "" if found.settable else f"{where} cannot be set"
    if use.kind == "read":
        return "" if found.readable else f"{where} can only be set"
    count = (use.arguments or 0) - (
        use.name == "__init__" and use.owner in ("ILogger", "IProgressMonitor", "IStreamWriter")
    )
    return "" if use.arguments is None or found.takes(count) else f"{where} does not take {count} arguments"


def all_uses() -> Iterator[Use]:
    return (use for path in FILES for use in uses_of(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_use_is_in_the_bindings(path: Path) -> None:
    assert [f"{use.file}:{use.line}: {problem(use)}" for use in uses_of(path) if problem(use)] == []


def test_the_uses_are_found() -> None:
    """Of each file that talks to the library, each class, and each way to use a name."""
    below = [path for path in HOME.rglob("*.py") if path not in FILES]
    assert below and not [path for path in below if "load_library" in (code := path.read_text()) or "trt." in code]
    seen = list(all_uses())
    assert {"build.py", "engine.py", "kernels.py", "library.py", "network.py", "runner.py"} <= {u.file for u in seen}
    assert {"Builder", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "ILayer", "INetworkDefinition", "Runtime",
            "IOptimizationProfile", "IRuntimeConfig", "ITensor", "OnnxParser", "ParserError", "IAttention",
            "DataType", "LayerType", "IProgressMonitor", MODULE} <= {u.owner for u in seen}  # fmt: skip
    assert {u.kind for u in seen} == {"read", "set", "call", "override"}
    assert len({(u.owner, u.name) for u in seen}) > 60


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("context.set_tensor_adress('x', 1)", "no IExecutionContext.set_tensor_adress"),
        ("context.set_tensor_address('x')", "IExecutionContext.set_tensor_address does not take 1 arguments"),
        ("trt.LayerTyp.ATTENTION_INPUT", "no LayerTyp"),
        ("trt.LayerType.ATENTION_INPUT", "no LayerType.ATENTION_INPUT"),
        ("kinds = trt.LayerType\nkinds.ATENTION_INPUT", "no LayerType.ATENTION_INPUT"),
        ("config = builder.create_builder_config()\nconfig.num_compute_capability = 1",
         "no IBuilderConfig.num_compute_capability"),
        ("made = trt.Runtime(log)\nmade.engine_host_code = False", "no Runtime.engine_host_code"),
        ("tensor.dtype = 1", "ITensor.dtype cannot be set"),
        ("context.device_memory", "IExecutionContext.device_memory can only be set"),
        ("layer.attention", "no ILayer.attention"),
        ("layer.__class__ = trt.IAttentionInputLayer\nlayer.attention.decomposible = True",
         "no IAttention.decomposible"),
        ("class Own(trt.IProgressMonitor):\n    def phase_began(self, name): pass", "no IProgressMonitor.phase_began"),
        ("class Own(trt.ILogger):\n    def log(self, msg): pass", "ILogger.log does not take 1 arguments"),
        ("[e.description() for e in [parser.get_error(i) for i in range(2)]]", "no ParserError.description"),
        ("trt.Builder(log, 3)", "Builder.__init__ does not take 2 arguments"),
        ("engine.device_memory_size", "no ICudaEngine.device_memory_size"),
        ("contexts = [engine.create_execution_context() for _ in range(2)]\ncontexts[0].run()\ncontexts.append(1)",
         "no IExecutionContext.run"),
        ("one = require(engine.create_execution_context())\none.run()", "no IExecutionContext.run"),
    ],
)  # fmt: skip
def test_a_misspelling_is_caught(line: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(
        "def f(trt, builder, context, engine, layer, tensor, parser, log):\n" + textwrap.indent(line, "    ")
    )
    assert wrong in [problem(use) for use in uses_of(path)]
    assert len([use for use in uses_of(path) if problem(use)]) == 1


def test_what_only_rtx_has_is_told_apart() -> None:
    """The list lets nothing through that TensorRT has too."""
    for name in RTX_MODULE:
        assert has_name(name, RTX_ONLY) and not any(has_name(name, letter) for letter in TRT_ONLY), name
    for cls, name in RTX_MEMBERS:
        assert member(cls, name, RTX_ONLY) and not any(member(cls, name, letter) for letter in TRT_ONLY), (cls, name)


def test_every_object_of_the_library_has_a_known_name() -> None:
    """A parameter or field of any type is known to `uses`, or is no object of the library."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            annotation = getattr(node, "annotation", None)
            if isinstance(annotation, ast.Name) and annotation.id == "Any":
                target = getattr(node, "arg", None) or ast.unparse(getattr(node, "target", node))
                found.add(str(target).removeprefix("self.").lstrip("_"))
    assert found - OTHER - {"rt", "torch"} <= set(KNOWN), found


# -- what the library does if a call fails, and the stand-in ------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "name", "failure"),
    [
        ("Builder", "__init__", "raises TypeError"), ("Runtime", "__init__", "raises TypeError"),
        ("IExecutionContext", "set_optimization_profile_async", "raises RuntimeError"),
        ("IOptimizationProfile", "set_shape", "raises RuntimeError"),
        ("IExecutionContext", "set_tensor_address", "False"), ("IExecutionContext", "set_input_shape", "False"),
        ("IExecutionContext", "execute_async_v3", "False"), ("OnnxParser", "parse_from_file", "False"),
        ("ICudaEngine", "create_execution_context", "None"), ("Runtime", "deserialize_cuda_engine", "None"),
        ("Builder", "build_serialized_network", "None"),
    ],
)  # fmt: skip
def test_how_calls_fail_is_known(cls: str, name: str, failure: str) -> None:
    for letter in BINDINGS:
        found = member(cls, name, letter)
        assert found is not None and found.failure == failure, (letter, found)


def standing(answer: Any) -> Any:
    """A stand-in whose context answers `answer` to everything, seen through the names of TensorRT."""

    def reply(*_arguments: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    names = ("set_tensor_address", "set_optimization_profile_async", "execute_async_v3", "is_stream_capturable")
    context = SimpleNamespace(**dict.fromkeys(names, reply))
    engine = SimpleNamespace(create_execution_context=lambda: context)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda _plan: engine, engine_host_code_allowed=None)
    trt = held(SimpleNamespace(Runtime=lambda _logger: runtime, spare=1), TRT_ONLY)
    return trt, trt.Runtime(None).deserialize_cuda_engine(b"").create_execution_context()


def test_the_stand_in_offers_what_the_library_has() -> None:
    trt, context = standing(True)
    assert context.set_tensor_address("x", 1) is context.set_optimization_profile_async(0, 7) is True
    for thing, name in ((trt, "spare"), (context, "is_stream_capturable"), (context, "set_tensor_adress")):
        with pytest.raises(AttributeError, match=rf"the library has no .*{name}"):
            getattr(thing, name)
    with pytest.raises(AttributeError, match="active_optimization_profile cannot be set"):
        context.active_optimization_profile = 1
    with pytest.raises(AttributeError, match=r"no IExecutionContext\.profile"):
        context.profile = 1
    with pytest.raises(TypeError, match="does not take 3 arguments"):
        context.set_tensor_address("x", 1, 2)
    with pytest.raises(Impossible, match=r"the stand-in has no IExecutionContext.set_input_shape"):
        _ = context.set_input_shape


@pytest.mark.parametrize(
    ("call", "answer", "allowed"),
    [
        (("set_tensor_address", "x", 1), False, True),
        (("execute_async_v3", 7), False, True),
        (("set_optimization_profile_async", 0, 7), False, False),
        (("set_optimization_profile_async", 0, 7), RuntimeError("no"), True),
        (("set_tensor_address", "x", 1), RuntimeError("no"), False),
        (("set_optimization_profile_async", 0, 7), ValueError("no"), False),
        (("execute_async_v3", 7), None, False),
    ],
)
def test_the_stand_in_answers_as_the_library_does(call: tuple[Any, ...], answer: Any, allowed: bool) -> None:
    _, context = standing(answer)
    name, *arguments = call
    if not allowed:
        with pytest.raises(Impossible, match=name):
            getattr(context, name)(*arguments)
    elif isinstance(answer, Exception):
        with pytest.raises(type(answer)):
            getattr(context, name)(*arguments)
    else:
        assert getattr(context, name)(*arguments) is answer


# -- names.json itself ---------------------------------------------------------------------------------------------


@needs_rtx
def test_the_installed_library_has_the_names() -> None:
    """The real module, if it is of the recorded version."""
    trt = load_library(RTX)
    if not BINDINGS[RTX_ONLY].endswith(f"=={trt.__version__}"):
        pytest.skip(f"tensorrt-rtx {trt.__version__} is installed, names.json has {BINDINGS[RTX_ONLY]}")
    for cls in CLASSES:
        real = {n for n in dir(getattr(trt, cls)) if not n.startswith("_")} if hasattr(trt, cls) else set()
        assert members_of(cls, RTX_ONLY) == real, cls


def test_the_file_is_small_and_as_written() -> None:
    text = NAMES_FILE.read_text(encoding="utf-8")
    assert written(json.loads(text)) == text
    assert len(text) < 50_000


@pytest.mark.bindings
@pytest.mark.skipif(bool(missing_tool()), reason=missing_tool() or "-")
def test_the_bindings_still_have_these_names() -> None:
    """Downloads the wheels and reads them again: `python -m tests.tensorrt_api.read_names` writes what differs."""
    assert read_all() == json.loads(NAMES_FILE.read_text(encoding="utf-8"))
