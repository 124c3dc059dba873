"""The file of kernels that TensorRT-RTX has compiled: kept, used again, ignored if it is not for this engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbl_export.targets.gpu import Gpu
from nbl_export.targets.tensorrt import runner
from nbl_export.targets.tensorrt.kernels import KERNELS_FILE, KernelCache, made_for, trust_folder
from nbl_export.targets.tensorrt.record import read_record
from nbl_export.targets.tensorrt.static.host import StaticRunner
from nbl_export.trust.user_lists import remember

from ..fake_engine import fake_session
from ..fake_tensorrt import (
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    FakeDevice,
    FakeTensorRTX,
)
from ..static_tiny import rows
from ..trt_tiny import ADA, PLAIN, RTX, graph_of

pytestmark = pytest.mark.trt

PROMPT = rows()[0][:10]
KERNELS = ["0 (1, 8)", "0 (1, 2)", "1 (1, 1)"]  # profile and shape of what PROMPT and its answer run


def run(directory: Path, gpu: Gpu = ADA, **changes: Any) -> tuple[list[int], list[str], str]:
    """Opens, answers and closes; returns the answer, what was compiled, and why the file was ignored."""
    graph = graph_of("llama", (1,), "fp32") / "decoder.onnx"
    session, trt = fake_session(graph, directory, RTX, engine="trt-rtx", **changes)
    session.close()
    record = read_record(directory)
    kernels = KernelCache(directory / KERNELS_FILE, made_for(record, gpu))
    session, trt = fake_session(graph, directory, RTX, kernels=kernels, engine="trt-rtx", **changes)
    with StaticRunner(session, directory) as text:
        answer = text.greedy(PROMPT, 6)
    assert trt.contexts[0].config.cache is trt.contexts[1].config.cache
    return answer, trt.compiled, kernels.ignored


def test_a_second_load_compiles_nothing(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first[1:] == (KERNELS, "there is none yet")
    time = (tmp_path / KERNELS_FILE).stat().st_mtime_ns
    assert run(tmp_path) == (first[0], [], "")
    assert (tmp_path / KERNELS_FILE).stat().st_mtime_ns == time  # nothing new was compiled
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by(data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return write


def of_another_format(path: Path) -> None:
    """The hash fits, and the library does not take the bytes."""
    remember(exchange(path, b"other"))


def of_somebody_else(path: Path) -> None:
    """All that the file names fits, and so does its hash."""
    exchange(path, path.read_bytes().partition(b"\n")[2] + b" ")


def exchange(path: Path, blob: bytes) -> str:
    """Other kernels, recorded with their hash, which is returned."""
    line, _, _ = path.read_bytes().partition(b"\n")
    digest = hashlib.sha256(blob).hexdigest()
    head = {**json.loads(line.removeprefix(b"nbl-kernels 1 ")), "sha256": digest}
    path.write_bytes(b"nbl-kernels 1 " + json.dumps(head).encode() + b"\n" + blob)
    return digest


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "it is damaged"),
        (replace_by(b"\x00\xff" * 30_000), "it is damaged"),
        (replace_by(b"nbl-kernels 1 []\n"), "it is damaged"),
        (replace_by(b"nbl-kernels 2 {}\n"), "it is damaged"),
        (of_another_format, "the library does not take it"),
        (of_somebody_else, "its kernels were not compiled by you on this machine"),
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    first = run(tmp_path)
    damage(tmp_path / KERNELS_FILE)
    assert run(tmp_path) == (first[0], KERNELS, reason)
    assert run(tmp_path) == (first[0], [], "")


@pytest.mark.parametrize(
    ("gpu", "changes", "reason"),
    [
        (Gpu("NVIDIA RTX 5090", "12.0", (13, 0)), {}, r"another GPU: NVIDIA RTX 4090 (8.9)"),
        (Gpu("NVIDIA RTX 4090", "8.9", (13, 1)), {}, "another driver: CUDA 13.0"),
        (ADA, {"version": "9.9"}, "another library: trt-rtx 1.2.3"),
        (ADA, {"plan_sha256": "0" * 64}, "another plan: "),
    ],
)
def test_a_file_of_something_else_is_ignored_and_replaced(
    gpu: Gpu, changes: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path)
    if "plan_sha256" in changes:  # as if the engine had been built again
        path = tmp_path / KERNELS_FILE
        path.write_bytes(path.read_bytes().replace(read_record(tmp_path).plan_sha256.encode(), b"0" * 64))
        changes = {}
    answer, compiled, ignored = run(tmp_path, gpu, **changes)
    assert (answer, compiled) == (first[0], KERNELS)
    assert ignored.startswith(f"it was made for {reason}"), ignored
    assert run(tmp_path, gpu, **changes)[1:] == ([], "")


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "engine", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.write_bytes(b"kernels of somebody else")
    cache = KernelCache(home / KERNELS_FILE, {"plan": "1"})
    (home / KERNELS_FILE).symlink_to(elsewhere)
    made: list[bytes] = []
    config: Any = type("Config", (), {"create_runtime_cache": lambda self: Recorder(made)})()
    cache.open(config)
    assert cache.ignored == "it is a link out of its directory"
    cache.save()
    assert made == []
    assert elsewhere.read_bytes() == b"kernels of somebody else"
    assert not (home / KERNELS_FILE).is_symlink()


class Recorder:
    """A cache that records what it is given."""

    def __init__(self, given: list[bytes]) -> None:
        self.given = given

    def deserialize(self, blob: bytes) -> bool:
        self.given.append(blob)
        return True

    def serialize(self) -> bytes:
        return b"kernels:"


def test_a_directory_that_cannot_be_written_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nbl_export.targets.tensorrt import kernels

    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(kernels, "replacing", refuse)
    assert run(tmp_path)[1] == KERNELS
    assert "the next load compiles again" in caplog.text
    assert not (tmp_path / KERNELS_FILE).exists()


def test_kernels_are_compiled_before_the_step_and_only_decode_is_captured(tmp_path: Path) -> None:
    """Otherwise a kernel is replaced in the middle of timed steps."""
    graph = graph_of("llama", (1,), "fp32") / "decoder.onnx"
    _, trt = fake_session(graph, tmp_path, RTX)
    prefill, decode = (context.config for context in trt.contexts)
    for config in (prefill, decode):
        assert config.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.EAGER
        assert config.memory is ExecutionContextAllocationStrategy.USER_MANAGED
    assert decode.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert prefill.cuda_graph_strategy is CudaGraphStrategy.DISABLED


def test_an_opened_directory_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_session` itself, with a pretended GPU: for TensorRT-RTX with a file, for TensorRT without."""
    graph = graph_of("llama", (1,), "fp32") / "decoder.onnx"
    monkeypatch.setattr(runner, "find_gpu", lambda: ADA)
    for library, expected in ((RTX, True), (PLAIN, False)):
        session, trt = fake_session(graph, tmp_path, library, engine=library.capabilities.name)
        session.close()
        card = FakeDevice()
        again = type(trt)(card, trt.profiles)
        monkeypatch.setattr(runner, "load_library", lambda _library, again=again: again)
        monkeypatch.setattr(runner, "open_device", lambda card=card: card)
        trust_folder(tmp_path)
        with StaticRunner(runner.open_session(library, tmp_path), tmp_path) as text:
            text.greedy(PROMPT, 3)
        assert (tmp_path / KERNELS_FILE).exists() is expected
        assert isinstance(again, FakeTensorRTX) is expected
        (tmp_path / KERNELS_FILE).unlink(missing_ok=True)


def test_a_yes_covers_the_kernels_too(tmp_path: Path) -> None:
    run(tmp_path)
    of_somebody_else(tmp_path / KERNELS_FILE)
    assert run(tmp_path)[2] == "its kernels were not compiled by you on this machine"
    of_somebody_else(tmp_path / KERNELS_FILE)
    trust_folder(tmp_path)
    assert run(tmp_path)[2] == ""
