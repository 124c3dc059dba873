"""Keeps memory that torch frees in the process, instead of handing it back to the system at every step.

glibc maps each block above 32 MiB anew (logits of 512 positions are 100 MB) and unmaps it when it is freed, so such
temporaries are made of pages that the kernel has to find and clear first: half a million page faults in a distillation
step of SmolLM2 (1024 tokens), a fifth of its time (bench/README.md). The process then keeps its peak until it ends,
which it would reach again anyway.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Tell glibc's malloc; False where the C library is another. Lasts as long as the process."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False
