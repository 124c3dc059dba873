"""The file of kernels that TensorRT-RTX has compiled: kept, used again, ignored if it is not for this engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.targets.tensorrt import runner
from nbl_export.targets.tensorrt.engine import TRT_RTX
from nbl_export.targets.tensorrt.kernels import KERNELS_FILE, KernelCache
from nbl_export.targets.tensorrt.record import read_record
from nbl_export.targets.tensorrt.static.host import StaticRunner
from nbl_export.trust.own_engines import remember

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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_format(path: Path) -> None:
    """The user's own, and the library does not take the bytes."""
    path.write_bytes(b"other")
    remember(hashlib.sha256(b"other").hexdigest())


def of_somebody_else(path: Path) -> None:
    """The library would take them."""
    path.write_bytes(path.read_bytes() + b";more")


@pytest.mark.parametrize("damage", [cut, of_another_format, of_somebody_else])
def test_a_file_of_something_else_is_ignored_and_replaced(damage: Callable[[Path], None], tmp_path: Path) -> None:
    first = run(tmp_path)
    damage(tmp_path / KERNELS_FILE)
    assert run(tmp_path) == (first[0], KERNELS)
    assert run(tmp_path) == (first[0], [])


def test_a_yes_covers_the_kernels_too(tmp_path: Path) -> None:
    run(tmp_path)
    of_somebody_else(tmp_path / KERNELS_FILE)
    assert TRT_RTX.trust(tmp_path)
    assert run(tmp_path)[1] == []


def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "engine", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.write_bytes(b"kernels:of this user")
    remember(hashlib.sha256(elsewhere.read_bytes()).hexdigest())
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
        remember(read_record(tmp_path).plan_sha256)
        with StaticRunner(runner.open_session(library, tmp_path), tmp_path) as text:
            text.greedy(PROMPT, 3)
        assert (tmp_path / KERNELS_FILE).exists() is expected
        assert isinstance(again, FakeTensorRTX) is expected
        (tmp_path / KERNELS_FILE).unlink(missing_ok=True)
