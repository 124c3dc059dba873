"""Plans that fit or not, and the runner on a fake that executes the same graph."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.engines.gpu import find_gpu
from nbl_export.engines.static.host import StaticDecoder, StaticRunner
from nbl_export.engines.static.on_ort import open_decoder
from nbl_export.engines.static.schedule import engine_profiles
from nbl_export.engines.tensorrt import library as tensorrt
from nbl_export.engines.tensorrt import record as engine_record
from nbl_export.engines.tensorrt import runner as trt_runner
from nbl_export.engines.tensorrt.record import EngineRecord, read_record
from nbl_export.engines.tensorrt.runner import TrtSession, refuse_misfit
from nbl_export.errors import CorruptError, NblError

from ..fake_tensorrt import FakeDevice, FakeTensorRT
from ..static_tiny import (
    SLOTS,
    SPEC,
    TOLERANCE,
    maps_of,
    rows,
    torch_logits,
    worst,
)
from ..tensorrt_api.held import held
from ..tensorrt_api.names import RTX_ONLY, TRT_ONLY
from ..trt_tiny import ADA, HOPPER, PLAIN, RTX, checkpoint_of, engine_of, graph_of, needs_rtx

# -- plans that do not fit -----------------------------------------------------------------------------------


def fake_record(graph_: Path, directory: Path, **changes: Any) -> EngineRecord:
    """An engine directory for the fake: the plan is the path of a graph."""
    decoder = open_decoder(graph_)
    plan = directory / "decoder.engine"
    plan.write_bytes(str(graph_).encode())
    layers = decoder.contract.cache_layers
    values: dict[str, Any] = {
        "engine": "trt", "version": FakeTensorRT.__version__, "precision": "fp32", "attention": "fused",
        "compute_capabilities": ("8.9",),
        "max_batch": 2, "prefill_chunk": 8, "max_seq_len": decoder.slots,
        "profiles": engine_profiles(2, 8, decoder.slots),
        "inputs": decoder.contract.inputs, "outputs": decoder.contract.outputs, "cache_layers": len(layers),
        "cache_bytes_per_token": 0, "cache_bytes": 0, "parse_seconds": 0.0, "build_seconds": 0.0,
        "plan_bytes": plan.stat().st_size, "plan_sha256": engine_record.digest_of(plan), "graph_sha256": {},
    }  # fmt: skip
    record = EngineRecord(**{**values, **changes})
    (directory / "engine.json").write_text(json.dumps(record.to_json()), encoding="utf-8")
    return record


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    assert read_record(tmp_path) == record
    assert record.contract.cache_layers == (0, 1)


def cut_plan(directory: Path) -> None:
    path = directory / "decoder.engine"
    path.write_bytes(path.read_bytes()[:-1])


def swap_plan(directory: Path) -> None:
    path = directory / "decoder.engine"
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_plan, "decoder.engine is cut short or replaced: .* nbl-export build DIR --engine trt"),
        (swap_plan, "decoder.engine is damaged: .* nbl-export build DIR --engine trt"),
        (lambda d: (d / "decoder.engine").unlink(), "decoder.engine is missing"),
        (lambda d: (d / "engine.json").write_text("{"), "engine.json cannot be read"),
        (lambda d: (d / "engine.json").write_text('{"schema": 9}'), "another schema"),
        (lambda d: (d / "engine.json").unlink(), "holds no engine: .* nbl-export build"),
    ],
)
def test_a_damaged_engine_is_refused(damage: Callable[[Path], object], reason: str, tmp_path: Path) -> None:
    fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    damage(tmp_path)
    with pytest.raises(NblError, match=reason) as caught:
        read_record(tmp_path)
    assert isinstance(caught.value, CorruptError) or "holds no engine" in str(caught.value)


def test_a_plan_for_something_else_is_refused_with_both_named(tmp_path: Path) -> None:
    record = fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    refuse_misfit(PLAIN, record, "1.2.3", ADA, tmp_path)
    again = "nbl-export build DIR --engine trt"
    for library, version, card, pattern in (
        (PLAIN, "1.2.4", ADA, rf"built by tensorrt 1.2.3, and 1.2.4 is installed.*{again}.*tensorrt==1.2.3"),
        (PLAIN, "1.2.3", HOPPER, rf"built for compute capability 8.9, and the NVIDIA H100 has 9.0; .*{again}"),
        (PLAIN, "1.2.3", "no NVIDIA driver is installed", "cannot run here: no NVIDIA driver"),
        (RTX, "1.2.3", ADA, "an engine of trt, not of trt-rtx"),
    ):
        with pytest.raises(NblError, match=pattern):
            refuse_misfit(library, record, version, card, tmp_path)
    rtx = dataclasses.replace(record, engine="trt-rtx")
    with pytest.raises(NblError, match=r"does not run on the NVIDIA H100.*9\.0; use --engine trt$"):
        refuse_misfit(RTX, rtx, "1.2.3", HOPPER, tmp_path)


@needs_rtx
def test_the_real_library_refuses_a_plan_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first call that needs a GPU: with one pretended, the library itself says no."""
    engine = engine_of()
    if not isinstance(find_gpu(), str):
        pytest.skip("this machine has a GPU")
    with pytest.raises(NblError, match="cannot run here: no NVIDIA driver"):
        trt_runner.open_session(RTX, engine)
    monkeypatch.setattr(trt_runner, "find_gpu", lambda: ADA)
    monkeypatch.setattr(trt_runner, "open_device", FakeDevice)
    with pytest.raises(NblError, match=r"TensorRT for RTX does not load .*decoder.engine.*nbl-export build"):
        trt_runner.open_session(RTX, engine)


# -- the runner on a fake that executes the same graph --------------------------------------------------------


def fake_session(
    graph_: Path, directory: Path, library: tensorrt.Library = PLAIN, *, captures: bool = True, **changes: Any
) -> tuple[TrtSession, FakeTensorRT]:
    card = FakeDevice(captures=captures)
    record = fake_record(graph_, directory, **changes)
    trt = FakeTensorRT(card, record.profiles)
    held_trt = held(trt, RTX_ONLY if library.runtime_graphs else TRT_ONLY)
    return TrtSession(library, directory, record, held_trt, card), trt


@pytest.mark.parametrize("library", [PLAIN, RTX], ids=["trt", "trt-rtx"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_the_runner_computes_what_torch_does(
    architecture: str,
    library: tensorrt.Library,
    tmp_path: Path,
) -> None:
    """Two rows of different length in chunks, then decode steps from the captured graph, to the last slot."""
    session, trt = fake_session(graph_of(architecture, (1,), "fp32") / "decoder.onnx", tmp_path, library)
    decoder = StaticDecoder(session)
    expected = torch_logits(checkpoint_of(architecture), maps_of([1]))
    for _ in range(2):  # begin forgets
        decoder.begin(2)
        ids, valid = np.array([row[:21] for row in rows()]), np.ones((2, 21), int)
        valid[1, 12:] = 0
        got = decoder.step(ids, valid)[:, 0]
        assert worst(got, np.stack([expected[0][20], expected[1][11]])) < TOLERANCE["fp32"]
        for k in range(SLOTS - 21):
            got = decoder.step(np.array([[rows()[0][21 + k]], [rows()[1][12 + k]]]))[:, 0]
            assert worst(got, np.stack([expected[0][21 + k], expected[1][12 + k]])) < TOLERANCE["fp32"]
    with pytest.raises(NblError, match="do not fit"):
        decoder.step(np.ones((2, 1), int))
    prefill, decode = trt.contexts
    assert [context.profile for context in trt.contexts] == [0, 1]
    assert set(prefill.runs) == {(2, 8), (2, 5)}
    assert set(decode.runs) == {(2, 1)}
    assert decode.graphs_by_itself is library.runtime_graphs
    assert not prefill.graphs_by_itself
    assert trt.device.captured == (0 if library.runtime_graphs else 1)
    assert trt.device.replayed == (0 if library.runtime_graphs else len(decode.runs) - 1)
    assert session.cache_bytes == 2 * SPEC.cache_bytes_per_token(2, 4) * SLOTS
    session.close()
    assert trt.device.closed


def test_a_step_that_cannot_be_captured_runs_plainly(tmp_path: Path) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path, captures=False)
    runner = StaticRunner(session, tmp_path)
    plain = StaticRunner(open_decoder(graph_of("llama", (1,), "fp32") / "decoder.onnx", 8).session, tmp_path)
    assert runner.greedy(rows()[0][:11], 12) == plain.greedy(rows()[0][:11], 12)
    assert (trt.device.captured, len(trt.contexts[1].runs)) == (0, 11)


def test_a_changed_batch_is_bound_and_captured_again(tmp_path: Path) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    decoder = StaticDecoder(session)
    for batch in (1, 2, 1):
        decoder.begin(batch)
        one = [decoder.step(np.array([row[:3]] * batch)) for row in rows()[:1]]
        steps = [decoder.step(np.array([[rows()[0][3 + k]]] * batch)) for k in range(3)]
        same = open_decoder(graph_of("llama", (1,), "fp32") / "decoder.onnx", 8)
        same.begin(1)
        assert worst(one[0][0], same.step(np.array([rows()[0][:3]]))[0]) < TOLERANCE["fp32"]
        for k, step in enumerate(steps):
            assert worst(step[-1], same.step(np.array([[rows()[0][3 + k]]]))[0]) < TOLERANCE["fp32"]
        assert session.cache_bytes == batch * SPEC.cache_bytes_per_token(2, 4) * SLOTS
    assert trt.device.captured == 3
    with pytest.raises(NblError, match=r"not built for 3 rows .* --max-batch"):
        decoder.begin(3)


def test_half_precision_logits_come_back_wide(tmp_path: Path) -> None:
    session, _ = fake_session(graph_of("llama", (1,), "fp16") / "decoder.onnx", tmp_path)
    wide = open_decoder(graph_of("llama", (1,), "fp32") / "decoder.onnx", 8)
    decoder = StaticDecoder(session)
    for each in (decoder, wide):
        each.begin(1)
    ids = np.array([rows()[0][:11]])
    got = decoder.step(ids)
    assert got.dtype == session.run(ids[:, :1], [11], [1]).dtype == np.float32
    assert 0 < worst(got, wide.step(ids)) < TOLERANCE["fp16"]


def test_what_the_library_refuses_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    StaticDecoder(session).begin(1)
    monkeypatch.setattr(trt.contexts[0], "execute_async_v3", lambda _stream: False)
    with pytest.raises(NblError, match="TensorRT refuses a step"):
        session.run(np.ones((1, 4), np.int64), [0], [4])
    record = read_record(tmp_path)
    (tmp_path / "decoder.engine").write_bytes(b"nowhere")
    nowhere = dataclasses.replace(record, plan_sha256=engine_record.digest_of(tmp_path / "decoder.engine"))
    with pytest.raises(NblError, match=r"does not load .*decoder.engine.*nbl-export build"):
        TrtSession(PLAIN, tmp_path, nowhere, trt, FakeDevice())


def test_a_plan_that_the_record_does_not_vouch_for_never_reaches_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan is code: also one that is exchanged after the record was read, or is a link to one elsewhere."""
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    session.close()
    record, plan = read_record(tmp_path), tmp_path / "decoder.engine"
    whole = plan.read_bytes()
    loaded: list[bytes] = []
    monkeypatch.setattr(trt, "deserialize_cuda_engine", loaded.append)
    plan.write_bytes(whole[::-1])
    with pytest.raises(CorruptError, match="its hash is not the one recorded"):
        TrtSession(PLAIN, tmp_path, record, trt, FakeDevice())
    (tmp_path.parent / "elsewhere.engine").write_bytes(whole)
    plan.unlink()
    plan.symlink_to(tmp_path.parent / "elsewhere.engine")
    with pytest.raises(CorruptError, match="is a link out of its directory"):
        TrtSession(PLAIN, tmp_path, record, trt, FakeDevice())
    with pytest.raises(CorruptError, match="is a link out of its directory"):
        read_record(tmp_path)
    assert loaded == []


def test_bfloat16_logits_are_widened() -> None:
    from ml_dtypes import bfloat16

    wanted = np.array([[[1.5, -3.0, 1e30]]], bfloat16)
    half = types.SimpleNamespace(dtype="bfloat16", shape=("batch", 1, 3))
    session = TrtSession.__new__(TrtSession)
    card = FakeDevice()
    address = card.allocate(6)
    ctypes.memmove(address, wanted.ctypes.data, 6)
    session._logits, session._device, session._buffers = half, card, {"logits": address}  # type: ignore[assignment]
    assert np.array_equal(session._download(1, 1), wanted.astype(np.float32))
