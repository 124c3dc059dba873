"""TensorRT without a GPU: what the real parser and builder of TensorRT-RTX take, and what the build refuses."""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import inspect
import os
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.targets.base import BuildSettings
from nbl_export.targets.tensorrt import build, kernels, runner
from nbl_export.targets.tensorrt import export as static
from nbl_export.targets.tensorrt.build import build_engine
from nbl_export.targets.tensorrt.library import load_library
from nbl_export.targets.tensorrt.messages import messages_of
from nbl_export.targets.tensorrt.network import ParsedNetwork, parse
from nbl_export.targets.tensorrt.record import read_record
from nbl_export.targets.tensorrt.static.schedule import engine_profiles

from ..fake_tensorrt import FakeDevice, FakeTensorRT
from ..static_tiny import HEAD, LAYERS, SLOTS, SPEC
from ..trt_tiny import ADA, PLAIN, RTX, SMALL, engine_of, graph_of, needs_rtx

pytestmark = pytest.mark.trt


def parsed(path: Path) -> ParsedNetwork:
    trt = load_library(RTX)
    return parse(trt, messages_of(trt), path)


# -- what the real parser and builder take --------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("architecture", "replaced", "precision"),
    [("mistral-window", r, p) for r, p in (((), "fp16"), ((1,), "fp16"), ((0, 2), "bf16"), ((0, 2), "int4"))]
    + [("llama", (1,), "int4"), ("mistral", (), "bf16")],
)
def test_the_parser_takes_it_and_reads_every_input(
    architecture: str, replaced: tuple[int, ...], precision: str
) -> None:
    found = parsed(graph_of(architecture, replaced, precision) / "decoder.onnx")
    kept = LAYERS - len(replaced)
    assert found.contract.cache_layers == tuple(range(kept))
    assert sum(i.name.startswith("past_key_values.") for i in found.contract.inputs) == 2 * kept
    assert found.precision == precision
    kinds = [layer.type.name for layer in found.layers]
    assert kinds.count("KV_CACHE_UPDATE") == 2 * kept
    assert kinds.count("ATTENTION_INPUT") == kept
    matrices = 7 * LAYERS - 4 * len(replaced) + len(replaced)
    assert kinds.count("DEQUANTIZE") == (matrices if precision == "int4" else 0)


@needs_rtx
@pytest.mark.parametrize(
    ("replaced", "behind", "precision"), [((), 0, "fp16"), ((0, 2), 1, "fp16"), ((1, 2), 2, "int4")], ids=str
)
def test_all_behind_the_last_kept_attention_is_on_one_token(
    replaced: tuple[int, ...], behind: int, precision: str
) -> None:
    """By the parser's shapes: o_proj and an MLP, a map and an MLP for each layer `behind`, and the head."""
    found = parsed(graph_of("llama", replaced, precision) / "decoder.onnx")
    products = [layer.get_output(0).shape for layer in found.layers if layer.type.name == "MATRIX_MULTIPLY"]
    assert len(products) == 7 * LAYERS - 3 * len(replaced) + 1
    assert sum(shape[1] == 1 for shape in products) == 1 + 3 + 4 * behind + 1
    assert [o.shape[1] for o in found.contract.outputs if o.name == "logits"] == [1]
    assert "num_tokens" in {i.name for i in found.contract.inputs}


@needs_rtx
def test_a_plan_is_built_with_its_record() -> None:
    engine = engine_of()
    record = read_record(engine)
    assert (engine / "decoder.engine").stat().st_size == record.plan_bytes > 1_000_000
    assert (record.engine, record.version) == ("trt-rtx", load_library(RTX).__version__)
    assert (record.precision, record.max_batch, record.prefill_chunk, record.max_seq_len) == ("fp16", 2, 16, SLOTS)
    assert record.attention == "fused"
    assert record.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert (
        record.cache_bytes_per_token == SPEC.cache_bytes_per_token(2, 2) == record.contract.cache_bytes_per_token(HEAD)
    )
    assert record.cache_bytes == record.cache_bytes_per_token * SLOTS * 2
    assert record.profiles == engine_profiles(2, 16, SLOTS)
    assert 0 < record.build_seconds < 60
    assert {p.name for p in engine.iterdir()} == {
        "config.json", "generation_config.json", "decoder.engine", "engine.json"
    }  # fmt: skip
    assert [p.name for p in engine.parent.iterdir()] == ["model"]


@needs_rtx
@pytest.mark.parametrize(("precision", "batch"), [("int4", 1), ("bf16", 4)])
def test_other_precisions_and_batches_build(precision: str, batch: int, tmp_path: Path) -> None:
    source = graph_of("mistral-window", (1,), precision)
    record = build_engine(RTX, source, tmp_path / "e", BuildSettings(batch, 16))
    assert record.precision == precision
    assert record.profiles == engine_profiles(batch, 16, SLOTS, two_rows=True)


@needs_rtx
@pytest.mark.parametrize(("precision", "batch"), [("bf16", 1), ("int4", 4)])
def test_an_exit_layer_builds_with_fused_attention(precision: str, batch: int, tmp_path: Path) -> None:
    """No row stops in a decode step, and the skipped rows have a map and no further copy of a matrix."""
    source = graph_of("llama", (), precision, exit_layer=(1, 8))
    found = parsed(source / "decoder.onnx")
    assert [o.shape[1] for o in found.contract.outputs if o.name == "logits"] == [1]
    assert [layer.type.name for layer in found.layers].count("KV_CACHE_UPDATE") == 2 * LAYERS
    record = build_engine(RTX, source, tmp_path / "e", BuildSettings(batch, 48))
    assert (record.attention, record.precision) == ("fused", precision)
    assert record.profiles == engine_profiles(batch, 48, SLOTS, two_rows=True)


@needs_rtx
def test_a_plan_has_each_matrix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill of one row alone would have copies of what runs on one token: behind the pruned tail, nearly all here."""
    source, settings = graph_of("llama", (1, 2)), BuildSettings(1, 16)
    data = (source / "decoder.onnx.data").stat().st_size
    once = build_engine(RTX, source, tmp_path / "once", settings).plan_bytes
    monkeypatch.setattr(build, "engine_profiles", lambda *sizes, two_rows: engine_profiles(*sizes))
    copied = build_engine(RTX, source, tmp_path / "copied", settings).plan_bytes
    assert copied - once > data / 2, (copied, once, data)


# -- faults that TensorRT would pass over in silence ---------------------------------------------------------


def with_ignored_input(source: Path, out: Path) -> Path:
    """The graph with nonpad_kv_seqlen, which the parser drops without a word."""
    model = ir.load(source / "decoder.onnx")
    extra = ir.Value(name="nonpad_kv_seqlen", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(extra)
    for node in model.graph:
        if node.op_type == "Attention":
            node.resize_inputs(7)
            node.replace_input_with(6, extra)
    static.save_graph(model, out)
    return out


@needs_rtx
def test_an_ignored_input_stops_the_build(tmp_path: Path) -> None:
    source = with_ignored_input(graph_of("llama"), tmp_path / "source")
    with pytest.raises(NblError, match="parser ignores the input nonpad_kv_seqlen"):
        build_engine(RTX, source, tmp_path / "e", SMALL)
    assert not (tmp_path / "e").exists()


class PlainConfig:
    """TensorRT 11.4's IBuilderConfig has no compute capabilities, and, like any pybind11 object, takes no others."""

    __slots__ = ("profiles",)

    def add_optimization_profile(self, _profile: object) -> int:
        return 0


def fake_network(config: Any, parts: tuple[bytes, ...] = (b"pl", b"an")) -> Any:
    """A network whose builder makes `config` and writes the parts of a plan."""

    def build_to_stream(_network: Any, _config: Any, writer: Any) -> bool:
        return bool(parts) and all(writer.write(part) == len(part) for part in parts)

    builder = types.SimpleNamespace(
        create_builder_config=lambda: config, build_serialized_network_to_stream=build_to_stream
    )
    flags = types.SimpleNamespace(REQUIRE_USER_ALLOCATION="user allocation")
    trt = types.SimpleNamespace(
        BuilderFlag=flags, LayerType=types.SimpleNamespace(ATTENTION_INPUT="attention"),
        __version__="1.2.3", IStreamWriter=type("IStreamWriter", (), {}),
    )  # fmt: skip
    network = types.SimpleNamespace(name="model")
    return types.SimpleNamespace(trt=trt, builder=builder, network=network, layers=(), precision="bf16")


def test_only_a_library_that_captures_by_itself_is_asked_for_kernels_that_can_be_captured(tmp_path: Path) -> None:
    log_ = messages_of(FakeTensorRT(FakeDevice(), ()))
    asked: list[str] = []
    config = types.SimpleNamespace(set_flag=asked.append)
    build._build(fake_network(config), log_, (), RTX, tmp_path / "plan")
    assert asked == ["user allocation"]
    build._build(fake_network(PlainConfig()), log_, (), PLAIN, tmp_path / "plan")


def test_a_plan_is_written_and_hashed_part_by_part(tmp_path: Path) -> None:
    log_ = messages_of(FakeTensorRT(FakeDevice(), ()))
    (tmp_path / "plan").write_bytes(b"of a way that was refused")
    built = build._build(fake_network(PlainConfig()), log_, (), PLAIN, tmp_path / "plan")
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert (built.plan_bytes, built.plan_sha256) == (4, hashlib.sha256(b"plan").hexdigest())
    with pytest.raises(NblError, match="TensorRT does not build model: it gives no reason"):
        build._build(fake_network(PlainConfig(), ()), log_, (), PLAIN, tmp_path / "plan")
    with pytest.raises(OSError, match="No space left"):  # the library would swallow an exception
        build._build(fake_network(PlainConfig(), (b"x" * 100_000,)), log_, (), PLAIN, Path("/dev/full"))


@needs_rtx
def test_bf16_is_the_default_of_tensorrt_and_refused_where_no_gpu_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PLAIN.capabilities.precisions[0] == RTX.capabilities.precisions[0] == "bf16"
    monkeypatch.setattr(build, "find_gpu", lambda: dataclasses.replace(ADA, compute="7.5"))
    as_tensorrt = dataclasses.replace(RTX, computes=())
    with pytest.raises(NblError, match=r"7\.5 has no bf16: use --precision fp16"):
        build_engine(as_tensorrt, graph_of("llama", (1,), "bf16"), tmp_path / "e", SMALL)
    record = build_engine(as_tensorrt, graph_of("llama", (1,)), tmp_path / "e", SMALL)
    assert (record.compute_capabilities, record.precision) == (("7.5",), "fp16")


@needs_rtx
@pytest.mark.parametrize(
    ("part", "warning", "refused"),
    [
        ("Builder", "CUDA lazy loading is not enabled.", False),  # of the machine
        ("OnnxParser", "One or more weights outside the range of FLOAT was clamped", True),
        ("OnnxParser", "TensorRT ignores the attribute softcap of Attention", True),
        ("OnnxParser", "Scatter was deprecated in Opset 11.", False),
        ("OnnxParser", "A node named x already exists", False),
    ],
)
def test_only_a_warning_that_the_graph_is_changed_stops_the_build(
    part: str, warning: str, refused: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trt = load_library(RTX)
    real = getattr(trt, part)

    def made(*given: Any) -> Any:
        given[-1].log(trt.ILogger.WARNING, warning)
        return real(*given)

    monkeypatch.setattr(trt, part, made)
    if refused:
        with pytest.raises(NblError, match=f"parser would change .*: {re.escape(warning)}$"):
            parsed(graph_of("llama") / "decoder.onnx")
    else:
        parsed(graph_of("llama") / "decoder.onnx")
        assert f"TensorRT: {warning}" in caplog.messages


# -- refusals of the build -----------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("settings", "reason"),
    [(BuildSettings(1, SLOTS + 1), "key prefill_chunk 97"), (BuildSettings(0, 8), "key max_batch 0")],
)
def test_settings_that_cannot_be_built_are_refused(settings: BuildSettings, reason: str, tmp_path: Path) -> None:
    with pytest.raises(NblError, match=reason):
        build_engine(RTX, graph_of("llama"), tmp_path / "e", settings)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "decoder.onnx").unlink(), "holds no decoder.onnx"),
        (lambda d: (d / "decoder.onnx").write_text("not a model"), "not an ONNX model"),
        (lambda d: (d / "decoder.onnx.data").unlink(), "which holds weights of decoder.onnx, is missing"),
        (lambda d: os.truncate(d / "decoder.onnx.data", 1000), "refuses"),
    ],
)
def test_a_damaged_graph_is_refused(damage: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in graph_of("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    damage(source)
    with pytest.raises(NblError, match=reason) as caught:
        build_engine(RTX, source, tmp_path / "e", SMALL)
    assert str(source) in str(caught.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("place", ["../secret", "link", "*/_ORT_MEM_ADDR_/*"])
def test_the_parser_gets_no_graph_with_weights_elsewhere(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4))
    (source / "link").symlink_to("../secret")
    weight = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=place)
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    (source / "decoder.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    given: list[Path] = []
    monkeypatch.setattr(build, "load_library", lambda _: None)
    monkeypatch.setattr(build, "messages_of", lambda _: None)
    monkeypatch.setattr(build, "parse", lambda *of: given.append(of[-1]))
    with pytest.raises(CorruptError, match=r"outside its directory|out of its directory|an address of memory"):
        build_engine(RTX, source, tmp_path / "e", SMALL)
    assert given == []


@needs_rtx
@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt(), ""), (OSError(errno.ENOSPC, "No space left on device"), "no space left")]
)
def test_a_build_that_ends_early_leaves_what_was_there(
    error: BaseException, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_path: Path, _value: object) -> None:
        raise error

    out = tmp_path / "engine" / "model"
    out.mkdir(parents=True)
    (out / "mine").write_text("old")
    monkeypatch.setattr(build, "write_json", stop)
    with pytest.raises(NblError if told else KeyboardInterrupt, match=told or None):
        build_engine(RTX, graph_of("llama", (1,)), out, SMALL)
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    assert [p.name for p in out.iterdir()] == ["mine"]


# -- the API is the installed library's ----------------------------------------------------------------------

# What the variables of files that need a GPU are, in the library's classes.
CLASSES = {
    runner: {"runtime": "Runtime", "context": "IExecutionContext", "engine": "ICudaEngine",
             "config": "IRuntimeConfig", "runtime_config": "IRuntimeConfig",
             "graphs": "CudaGraphStrategy", "kinds": "DynamicShapesKernelSpecializationStrategy"},
    kernels: {"runtime_config": "IRuntimeConfig", "cache": "IRuntimeCache"},
}  # fmt: skip


def uses(module: types.ModuleType, names: dict[str, str]) -> list[tuple[str, str, int | None]]:
    """(class, attribute, number of arguments or None) wherever a known variable's attribute is read or called."""
    tree = ast.parse(inspect.getsource(module))
    plain = (
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and not any(isinstance(a, ast.Starred) for a in n.args)
    )
    calls = {id(node.func): len(node.args) for node in plain}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found.append((names[node.value.id], node.attr, calls.get(id(node))))
    return found


def signature_takes(doc: str, count: int) -> bool:
    """Whether one of a pybind11 docstring's overloads takes so many arguments beside self."""
    for line in re.findall(r"^\s*(?:\d+\. )?\w+\(self[^)]*?(.*)\) ->", doc, re.M):
        parts = [p for p in re.sub(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>", "", line).split(",")[1:] if p.strip()]
        if sum("=" not in p for p in parts) <= count <= len(parts):
            return True
    return False


@needs_rtx
@pytest.mark.parametrize("module", CLASSES, ids=lambda m: m.__name__.rsplit(".", 1)[1])
def test_every_name_is_in_the_installed_library(module: types.ModuleType) -> None:
    trt = load_library(RTX)
    seen = uses(module, CLASSES[module])
    assert {name for name, _, _ in seen} == set(CLASSES[module].values())
    for name, attribute, arguments in seen:
        member = getattr(getattr(trt, name), attribute)
        if arguments is not None and "->" in (member.__doc__ or ""):
            assert signature_takes(member.__doc__, arguments), (name, attribute, arguments, member.__doc__)
    for _, attribute, _ in uses(module, {"trt": ""}):
        assert hasattr(trt, attribute), attribute
