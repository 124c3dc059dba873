"""Keeps the stack on which signals are handled, which OpenVINO's CPU plugin replaces and frees.

Where a thread has a small stack for signals or none, the plugin gives it one for AMX
(https://github.com/openvinotoolkit/openvino/pull/11894). Seen with OpenVINO 2026.4: if the first of two models is freed
first, the thread keeps the address of freed memory. Python handles signals on this stack, so the next Ctrl-C would end
the process by SIGSEGV.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

__all__ = ["kept_signal_stack"]


class _Stack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Within, the plugin may be loaded; this thread has its own signal stack, or none, afterwards."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    own = _Stack()
    libc.sigaltstack(None, ctypes.byref(own))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(own), None)
