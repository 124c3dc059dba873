"""The file of kernels that TensorRT-RTX has compiled: kept, used again, ignored if it is not for this engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbl_export.targets.tensorrt import runner
from nbl_export.targets.tensorrt.kernels import KERNELS_FILE, KernelCache
from nbl_export.targets.tensorrt.static.host import StaticRunner

from ..fake_engine import fake_session
from ..fake_tensorrt import FakeDevice, FakeTensorRTX
from ..static_tiny import rows
from ..trt_tiny import ADA, PLAIN, RTX, graph_of

pytestmark = pytest.mark.trt

PROMPT = rows()[0][:10]
KERNELS = ["0 (1, 8)", "0 (1, 2)", "1 (1, 1)"]  # profile and shape of what PROMPT and its answer run


def run(directory: Path) -> tuple[list[int], list[str]]:
    """Opens, answers and closes; returns the answer, and what was compiled."""
    kernels = KernelCache(directory / KERNELS_FILE)
    session, trt = fake_session(
        graph_of("llama", (1,), "fp32") / "decoder.onnx", directory, RTX, kernels=kernels, engine="trt-rtx"
    )
    with StaticRunner(session, directory) as text:
        answer = text.greedy(PROMPT, 6)
    assert trt.contexts[0].config.cache is trt.contexts[1].config.cache
    return answer, trt.compiled


def test_a_second_load_compiles_nothing(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first[1] == KERNELS
    time = (tmp_path / KERNELS_FILE).stat().st_mtime_ns
    assert run(tmp_path) == (first[0], [])
    assert (tmp_path / KERNELS_FILE).stat().st_mtime_ns == time  # nothing new was compiled
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp")] == []


def test_a_file_that_the_library_does_not_take_is_replaced(tmp_path: Path) -> None:
    first = run(tmp_path)
    (tmp_path / KERNELS_FILE).write_bytes(b"other")
    assert run(tmp_path) == (first[0], KERNELS)
    assert run(tmp_path) == (first[0], [])


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "engine", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.write_bytes(b"kernels:of this user")
    (home / KERNELS_FILE).symlink_to(elsewhere)
    assert run(home)[1] == KERNELS
    assert elsewhere.read_bytes() == b"kernels:of this user"
    assert not (home / KERNELS_FILE).is_symlink()


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
        with StaticRunner(runner.open_session(library, tmp_path), tmp_path) as text:
            text.greedy(PROMPT, 3)
        assert (tmp_path / KERNELS_FILE).exists() is expected
        assert isinstance(again, FakeTensorRTX) is expected
        (tmp_path / KERNELS_FILE).unlink(missing_ok=True)
