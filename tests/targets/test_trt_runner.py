"""Plans that fit or not, and the runner on a stand-in that executes the graph in ONNX Runtime.

The stand-in computes what ONNX Runtime computes, so no test here says anything of TensorRT's arithmetic: `nbl-export
accept` does, on a GPU. What is tested is this project's part: addresses, shapes, profiles, positions, slots of the
caches, captured steps. Wrong data of a step would change logits, which are equal bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import CorruptError, NblError
from nbl_export.targets.gpu import find_gpu
from nbl_export.targets.tensorrt import library as tensorrt
from nbl_export.targets.tensorrt import runner as trt_runner
from nbl_export.targets.tensorrt.record import read_plan, read_record
from nbl_export.targets.tensorrt.runner import TrtSession, refuse_misfit
from nbl_export.targets.tensorrt.static.host import CheckedRunner, StaticRunner, likeliest, widened
from nbl_export.targets.tensorrt.static.schedule import Profile, engine_profiles

from ..fake_engine import fake_record, fake_session
from ..fake_tensorrt import Context, FakeDevice, FakeTensorRT
from ..static_tiny import SLOTS, TOLERANCE, VOCAB, maps_of, open_decoder, rows, torch_logits, worst
from ..trt_tiny import ADA, HOPPER, PLAIN, RTX, checkpoint_of, engine_of, graph_of, needs_rtx

pytestmark = pytest.mark.trt

# -- plans that do not fit -----------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    record = fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    assert read_record(tmp_path) == record
    assert record.contract.cache_layers == (0, 1)


def plan_of(directory: Path, part: slice) -> None:
    path = directory / "decoder.engine"
    path.write_bytes(path.read_bytes()[part])


@pytest.mark.parametrize(
    ("damage", "kind", "reason"),
    [
        (lambda d: plan_of(d, slice(-1)), CorruptError, "is cut short or replaced: .* nbl-export build DIR"),
        (lambda d: plan_of(d, slice(None, None, -1)), CorruptError, "engine is damaged: .* nbl-export build DIR"),
        (lambda d: (d / "decoder.engine").unlink(), CorruptError, "decoder.engine is missing"),
        (lambda d: (d / "engine.json").write_text("{"), CorruptError, "engine.json cannot be read"),
        (lambda d: (d / "engine.json").write_text('{"schema": 9}'), CorruptError, "another schema"),
        (lambda d: (d / "engine.json").unlink(), NblError, "holds no engine: .* nbl-export build"),
    ],
)
def test_a_damaged_engine_is_refused(
    damage: Callable[[Path], object], kind: type[NblError], reason: str, tmp_path: Path
) -> None:
    fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    damage(tmp_path)
    with pytest.raises(NblError, match=reason) as caught:
        read_plan(tmp_path, read_record(tmp_path))
    assert type(caught.value) is kind


def test_an_engine_of_another_gpu_of_the_same_kind_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    refuse_misfit(PLAIN, record, "1.2.3", ADA, tmp_path)
    assert not caplog.messages
    refuse_misfit(PLAIN, record, "1.2.3", dataclasses.replace(ADA, name="NVIDIA L4"), tmp_path)
    assert "chosen on the NVIDIA RTX 4090, and runs on the NVIDIA L4; build it again here" in caplog.text


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


# -- the runner on a stand-in that executes the same graph ---------------------------------------------------


@pytest.mark.parametrize("library", [PLAIN, RTX], ids=["trt", "trt-rtx"])
@pytest.mark.parametrize("architecture", ["llama", "mistral-window"])
def test_steps_have_the_tokens_positions_and_caches_that_torch_has(
    architecture: str, library: tensorrt.Library, tmp_path: Path
) -> None:
    """Two rows in steps, the second padded, then decode steps from the captured graph, to the last slot.

    The tolerance is what ONNX Runtime and torch differ by.
    """
    session, trt = fake_session(graph_of(architecture, (1,), "fp32") / "decoder.onnx", tmp_path, library)
    expected = np.stack(torch_logits(checkpoint_of(architecture), maps_of([1])))
    ids = np.array(rows())
    for _ in range(2):  # begin forgets
        session.begin(2)
        for start, count, width in ((0, 8, 8), (8, 5, 8), *((k, 1, 1) for k in range(13, SLOTS))):
            got = session.run(ids[:, start : start + width], start, count)[:, 0]
            assert worst(got, expected[:, start + count - 1]) < TOLERANCE["fp32"], start
    prefill, decode = trt.contexts
    assert [context.profile for context in trt.contexts] == [0, 1]
    assert set(prefill.runs) == {(2, 8)}
    assert set(decode.runs) == {(2, 1)}
    assert decode.graphs_by_itself is library.jit
    assert not prefill.graphs_by_itself
    assert trt.device.captured == (0 if library.jit else 1)
    assert trt.device.replayed == (0 if library.jit else len(decode.runs) - 1)
    session.close()
    assert trt.device.closed


def test_a_step_that_cannot_be_captured_runs_plainly(tmp_path: Path) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path, captures=False)
    runner = StaticRunner(session, tmp_path)
    plain = CheckedRunner(open_decoder(graph_of("llama", (1,), "fp32") / "decoder.onnx", 8), tmp_path)
    assert runner.greedy(rows()[0][:11], 12) == plain.greedy(rows()[0][:11], 12)
    assert (trt.device.captured, len(trt.contexts[1].runs)) == (0, 11)


def test_a_changed_batch_is_bound_and_captured_again(tmp_path: Path) -> None:
    """Also behind a batch that ran no step: it moves the caches, and a graph before it would write to the old place."""
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    same = open_decoder(graph_of("llama", (1,), "fp32") / "decoder.onnx", 8)
    for batch in (1, 2, 1, 1):
        session.begin(2)
        for each in (session, same):
            each.begin(batch)
        for start, end in ((0, 3), (3, 4), (4, 5), (5, 6)):
            ids = np.array([row[start:end] for row in rows()[:batch]])
            assert np.array_equal(session.run(ids, start, end - start), same.step(ids)), (batch, start)
    assert trt.device.captured == 4
    with pytest.raises(NblError, match=r"not built for 3 rows .* key max_batch"):
        session.begin(3)


@pytest.mark.parametrize("library", [PLAIN, RTX], ids=["trt", "trt-rtx"])
def test_one_row_and_a_batch_decode_in_profiles_of_their_own(library: tensorrt.Library, tmp_path: Path) -> None:
    """A context whose profile does not take the batch is left alone; each batch has its graph and the right numbers."""
    graph = graph_of("llama", (1,), "fp32") / "decoder.onnx"
    profiles = tuple(dataclasses.replace(p, batch=(1, 1, 1)) if p.name == "decode" else p
                     for p in engine_profiles(4, 8, SLOTS))  # fmt: skip
    session, trt = fake_session(graph, tmp_path, library, profiles=profiles)
    same = open_decoder(graph, 8)
    for batch in (1, 4, 1):
        for each in (session, same):
            each.begin(batch)
        for start, end in ((0, 3), (3, 4), (4, 5)):
            ids = np.array([rows()[k % 2][start + k : end + k] for k in range(batch)])
            assert np.array_equal(session.run(ids, start, end - start), same.step(ids)), (batch, start)
    _, one, many = trt.contexts
    assert (set(one.runs), set(many.runs)) == ({(1, 1)}, {(4, 1)})
    assert [context.graphs_by_itself for context in trt.contexts[1:]] == [library.jit] * 2
    assert trt.device.captured == (0 if library.jit else 3)


def test_both_contexts_work_in_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    prefill, decode = trt.contexts
    assert prefill.memory == decode.memory == (prefill.memory[0], trt.device_memory_size_v2)
    assert [b.nbytes for b in trt.device.buffers.values()].count(trt.device_memory_size_v2) == 1
    session.close()
    monkeypatch.setattr(FakeTensorRT, "device_memory_size_v2", 0)  # the library refuses the address 0
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    assert [context.memory for context in trt.contexts] == [None, None]
    session.close()


def test_half_precision_logits_come_back_wide(tmp_path: Path) -> None:
    graph = graph_of("llama", (1,), "fp16") / "decoder.onnx"
    session, _ = fake_session(graph, tmp_path)
    same = open_decoder(graph, 8)
    for each in (session, same):
        each.begin(1)
    ids = np.array([rows()[0][:7]])
    raw = session.run(ids, 0, 7)
    got = widened(raw)
    assert (got.dtype, raw.dtype) == (np.float32, np.float16)
    assert np.array_equal(got, same.step(ids)) and got.any()


def raises(error: Exception) -> Callable[..., Any]:
    def method(*_: object) -> None:
        raise error

    return method


@pytest.mark.parametrize(
    ("name", "said", "reason"),
    [
        ("execute_async_v3", "CUDA error 700", "TensorRT refuses a step: CUDA error 700"),
        ("set_tensor_address", "", "TensorRT refuses the address of .*: it gives no reason"),
        ("set_input_shape", "", "TensorRT refuses the shape of .*: it gives no reason"),
    ],
)
def test_a_refusal_is_an_error_and_the_session_goes_on(
    name: str, said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    ids = np.ones((1, 4), np.int64)
    with monkeypatch.context() as patched, pytest.raises(NblError, match=reason):  # noqa: PT012
        patched.setattr(Context, name, lambda *_: bool(said) and trt.say("ERROR", said))
        session.begin(1)
        session.run(ids, 0, 4)
    session.begin(1)  # binds again what was not bound to the end
    assert session.run(ids, 0, 4).shape == (1, 1, VOCAB)


def test_a_shape_that_was_refused_is_set_again(tmp_path: Path) -> None:
    """The library may have taken it: what the context has is unknown."""
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    session.begin(1)
    ids = np.ones((1, 4), np.int64)
    first = session.run(ids, 0, 4)
    trt.profiles = (Profile("prefill", (1, 1, 1), (1, 4, 4)), trt.profiles[1])  # the plan is narrower than its record
    with pytest.raises(NblError, match=r"the shape of input_ids: input_ids: \(1, 5\) does not satisfy"):
        session.run(np.ones((1, 5), np.int64), 0, 5)
    assert np.array_equal(session.run(ids, 0, 4), first)
    assert trt.contexts[0].runs == [(1, 4), (1, 4)]


@pytest.mark.parametrize(
    ("name", "answer", "reason"),
    [
        ("Runtime", raises(TypeError("factory function returned nullptr")), "does not load .*: TypeError: factory fun"),
        ("deserialize_cuda_engine", lambda *_: None, r"does not load .*decoder.engine.*nbl-export build DIR"),
        ("create_runtime_config", lambda *_: None, "TensorRT refuses a runtime configuration: it gives no reason"),
        ("create_execution_context", lambda *_: None, "TensorRT refuses a context for the engine"),
        ("create_execution_context", raises(RuntimeError("no")), "TensorRT refuses to prepare the engine: no"),
    ],
)
def test_a_session_that_does_not_open_is_an_error_and_leaves_no_memory(
    name: str, answer: Callable[..., Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, closed = FakeDevice(), []
    monkeypatch.setattr(FakeDevice, "close", lambda self: closed.append(self))
    record = fake_record(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    trt = FakeTensorRT(card, record.profiles)
    monkeypatch.setattr(trt, name, answer)
    with pytest.raises(NblError, match=reason):
        TrtSession(PLAIN, tmp_path, record, trt, card)
    assert closed == [card]


def test_the_device_is_closed_even_if_waiting_for_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, trt = fake_session(graph_of("llama", (1,), "fp32") / "decoder.onnx", tmp_path)
    monkeypatch.setattr(trt.device, "synchronize", raises(NblError("the GPU refuses cudaStreamSynchronize")))
    with pytest.raises(NblError, match="cudaStreamSynchronize"):
        session.close()
    assert trt.device.closed
    assert not session._contexts


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


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_logits_are_read_from_their_bits(dtype: str) -> None:
    import ml_dtypes

    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def raw(*numbers: float) -> np.ndarray:
        wide = np.array(numbers, kind)
        return wide.view(np.uint16) if dtype == "bfloat16" else wide

    rng = np.random.default_rng(0)
    for shift in (0, -50, 50):
        some = (3 * rng.standard_normal(500) + shift).tolist()
        wide = widened(raw(*some))
        assert wide.dtype == np.float32 and np.array_equal(wide, np.array(some, kind).astype(np.float32))
        assert wide[likeliest(raw(*some))] == wide.max()
    assert likeliest(raw(-np.inf, -2, -0.5, -np.inf)) == 2
    for bad in (np.nan, -np.nan, np.inf):
        assert {likeliest(raw(sign, bad, sign)) for sign in (1.0, -1.0)} == {-1}
