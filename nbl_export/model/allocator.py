"""Keeps memory that torch frees in the process, instead of returning the memory to the system at every step.

glibc maps each block above 32 MiB anew (logits of 512 positions are 100 MB), and unmaps the block when freed. The
kernel must find and clear the pages of every such block. A distillation step of SmolLM2 (1024 tokens) spends a fifth
of its time on half a million page faults (docs/experiments.md). The process then keeps its peak memory until it ends;
every step reaches that peak anyway.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


def keep_freed_memory() -> bool:
    """Set glibc's malloc for the rest of the process; False if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False
