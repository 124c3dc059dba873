"""Rates of this machine: products, by which an estimate divides work, and what threads read together.

Other programs that run at the same time make a rate too low.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["READ_BYTES", "best_seconds", "product_flops_per_second", "read_bytes_per_second"]

_ROWS, _WIDTH, _PRODUCTS = 512, 1024, 20
READ_BYTES = 512 << 20  # more than caches hold


@functools.cache  # each process measures once
def product_flops_per_second() -> float:
    """Additions and multiplications a second of a float32 product, in a tenth of a second."""
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(shape, np.float32) for shape in ((_ROWS, _WIDTH), (_WIDTH, _WIDTH)))
    return 2.0 * _ROWS * _WIDTH**2 / best_seconds(lambda: x @ weight, _PRODUCTS)


@functools.cache
def read_bytes_per_second(threads: int) -> float:
    """Bytes a second that so many threads read from memory together, in a second and `READ_BYTES` of memory."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)

    def read() -> None:
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(part.nbytes for part in parts) / best_seconds(read)


def best_seconds(run: Callable[[], Any], repetitions: int = 4) -> float:
    """The shortest of some runs, after one that is not counted."""
    run()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
