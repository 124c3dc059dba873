"""Waits until no thread of this process computes.

An engine's threads spin for a while after their work is done; ONNX Runtime's spin for about 45 ms (two threads of an
AMD EPYC). A run timed during that period shares its cores with these threads: a prefill of 512 tokens took a tenth
longer (docs/experiments.md). This module does not wait for other processes; `background` counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until_idle"]

_LOOK = 0.01  # seconds of one observation
_SHARE = 0.2  # share of one core that an idle process may use
_LIMIT = 1.0  # longest wait in seconds


def wait_until_idle(
    cpu: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep, limit: float = _LIMIT
) -> bool:
    """Return True when all threads together use less than a fifth of one core, or False after `limit` seconds.

    Args:
        cpu: returns the processor seconds of the process, all threads together.
    """
    for _ in range(round(limit / _LOOK)):
        before = cpu()
        sleep(_LOOK)
        if cpu() - before < _SHARE * _LOOK:
            return True
    return False
