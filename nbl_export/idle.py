"""Waits until nothing of this process computes any more.

Threads of an engine go on spinning when their work is done, in case there is more: those of ONNX Runtime for some 45 ms
(two threads of an AMD EPYC). A run timed meanwhile shares its cores with these threads: a prefill of 512 tokens took
a tenth longer (bench/README.md, "The order of rounds"). Other processes are not waited for: `background` counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["wait_until_idle"]

_LOOK = 0.01  # seconds for which the process is watched
_SHARE = 0.2  # of one core that may be in use by what is called idle
_LIMIT = 1.0  # seconds after which it is not waited for any longer


def wait_until_idle(
    cpu: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep, limit: float = _LIMIT
) -> bool:
    """Return true when all threads together use less than a fifth of one core, false after `limit` seconds of more.

    Args:
        cpu: seconds that the process has computed, all threads together.
    """
    for _ in range(round(limit / _LOOK)):
        before = cpu()
        sleep(_LOOK)
        if cpu() - before < _SHARE * _LOOK:
            return True
    return False
