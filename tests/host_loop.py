"""Microseconds that the host takes for a token of an engine on a GPU, with a stand-in that computes nothing.

    python -m tests.host_loop

The real runner and its loop; copies between host and device are copies in memory. A GPU adds its computation, and the
latency of a launch, of an upload and of a download. Decode is one captured step, as with TensorRT.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from nbl_export.records.decoder import TensorInfo
from nbl_export.targets.tensorrt import runner
from nbl_export.targets.tensorrt.library import LIBRARIES
from nbl_export.targets.tensorrt.record import EngineRecord
from nbl_export.targets.tensorrt.static.host import StaticRunner
from nbl_export.targets.tensorrt.static.schedule import engine_profiles

from .fake_tensorrt import FakeDevice, FakeTensorRT

_SLOTS, _TOKENS, _ROUNDS = 2048, 400, 7


def microseconds(dtype: str, vocabulary: int) -> dict[str, float]:
    """Medians of one `append` of a token, and of one `pick`."""
    session = _session(dtype, vocabulary)
    with tempfile.TemporaryDirectory() as name:
        decoder = StaticRunner(session, Path(name))
        found: dict[str, list[float]] = {"append": [], "pick": []}
        for _ in range(_ROUNDS):
            decoder.begin(_SLOTS)
            decoder.append([1, 2, 3])
            for _ in range(_TOKENS):
                start = time.perf_counter()
                decoder.append([4])
                between = time.perf_counter()
                decoder.pick()
                found["append"].append(between - start)
                found["pick"].append(time.perf_counter() - between)
    return {kind: round(1e6 * statistics.median(seconds), 1) for kind, seconds in found.items()}


def _session(dtype: str, vocabulary: int) -> runner.TrtSession:
    cache = ("batch", 1, _SLOTS, 64)
    inputs = (
        TensorInfo("input_ids", "int64", ("batch", "tokens")), TensorInfo("write_indices", "int64", ("batch",)),
        TensorInfo("past_key_values.0.key", dtype, cache), TensorInfo("past_key_values.0.value", dtype, cache),
        TensorInfo("num_tokens", "int64", ("batch",)),
    )  # fmt: skip
    outputs = (TensorInfo("logits", dtype, ("batch", 1, vocabulary)),)
    record: Any = mock.create_autospec(EngineRecord, instance=True)
    record.inputs, record.outputs, record.max_seq_len, record.prefill_chunk = inputs, outputs, _SLOTS, 512
    record.profiles = engine_profiles(1, 512, _SLOTS)
    record.contract.inputs = inputs
    device = FakeDevice()
    yes = lambda *_: True  # noqa: E731
    context = SimpleNamespace(set_tensor_address=yes, set_input_shape=yes, execute_async_v3=yes)
    opened = {"_deserialize": (None, None), "_open_contexts": [context, context]}
    with mock.patch.multiple(runner, **{name: mock.Mock(return_value=value) for name, value in opened.items()}):
        trt = FakeTensorRT(device, record.profiles)
        session = runner.TrtSession(LIBRARIES["trt"], Path(), record, trt, device)
    for buffer in device.buffers.values():
        buffer[:] = 0  # of the logits too, which are NaN at first
    return session


if __name__ == "__main__":
    rows = {f"{dtype}, {size:,} tokens": microseconds(dtype, size) for dtype in ("float16", "bfloat16")
            for size in (49_152, 128_256)}  # fmt: skip
    print(json.dumps(rows, indent=1))  # noqa: T201
