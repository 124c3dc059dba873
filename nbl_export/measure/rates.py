"""Measures how fast this machine multiplies matrices and reads memory: the best of a few repetitions.

    fp32     MatMul, float32
    int8     MatMulInteger, uint8 by int8, which is faster on a CPU with dot-product instructions
    int4     MatMulNBits, blocks of 32, accuracy level 4, as in int4 graphs

Products run on ONNX Runtime's CPU provider with the requested threads: 512 rows by a 2048 x 2048 matrix. As many
threads read memory, each its own part of an array that no cache can hold.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nbl_export.graph.session import open_session

__all__ = ["gemm_flops_per_second", "read_bytes_per_second"]

_ROWS, _WIDTH, _BLOCK = 512, 2048, 32
_ARRAY_BYTES = 512 << 20
_REPETITIONS = 7


def gemm_flops_per_second(threads: int) -> dict[str, float]:
    """Additions and multiplications a second of each kernel above; takes a second or two."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((_WIDTH, _WIDTH)).astype(np.float32)
    codes = rng.integers(0, 256, (_WIDTH, _WIDTH // _BLOCK, _BLOCK // 2), dtype=np.uint8)
    scales = rng.random(_WIDTH * _WIDTH // _BLOCK, dtype=np.float32)
    packed: dict[str, Any] = {"K": _WIDTH, "N": _WIDTH, "bits": 4, "block_size": _BLOCK, "accuracy_level": 4}
    small = rng.integers(-100, 100, (_WIDTH, _WIDTH)).astype(np.int8)
    x = rng.standard_normal((_ROWS, _WIDTH)).astype(np.float32)
    x8 = rng.integers(0, 200, (_ROWS, _WIDTH)).astype(np.uint8)
    runs = {
        "fp32": _run("MatMul", x, [weight], threads),
        "int8": _run("MatMulInteger", x8, [small], threads),
        "int4": _run("MatMulNBits", x, [codes, scales], threads, domain="com.microsoft", **packed),
    }
    return {name: 2.0 * _ROWS * _WIDTH * _WIDTH / _best_seconds(run) for name, run in runs.items()}


def read_bytes_per_second(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory together."""
    array = np.ones(_ARRAY_BYTES // 8, np.int64)
    parts = np.array_split(array, threads)

    def read() -> None:
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return array.nbytes / _best_seconds(read)


def _best_seconds(run: Callable[[], Any]) -> float:
    run()
    seconds = []
    for _ in range(_REPETITIONS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _run(
    op: str, x: np.ndarray, constants: list[np.ndarray], threads: int, domain: str = "", **attributes: Any
) -> Callable[[], Any]:
    """A function that runs one node on x."""
    from onnx import TensorProto, helper, numpy_helper

    names = [f"c{i}" for i in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], domain=domain, **attributes)
    weights = [numpy_helper.from_array(c, name) for c, name in zip(constants, names, strict=True)]
    taken = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
    kind = TensorProto.INT32 if op == "MatMulInteger" else TensorProto.FLOAT
    given = helper.make_tensor_value_info("y", kind, [_ROWS, _WIDTH])
    graph = helper.make_graph([node], op, [taken], [given], weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = open_session(model.SerializeToString(), threads)
    return lambda: session.run(None, {"x": x})
