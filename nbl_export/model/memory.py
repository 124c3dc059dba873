"""Memory of this process: what it may still take, and that it keeps what torch frees.

A container's limit counts, since the kernel ends the process beyond it.

glibc maps each block above 32 MiB anew (logits of 512 positions are 100 MB), and unmaps the block when freed. The
kernel must find and clear the pages of every such block. A distillation step of SmolLM2 (1024 tokens) spends a fifth
of its time on half a million page faults (bench/EXPERIMENTS.md). The process then keeps its peak memory until it ends;
every step reaches that peak anyway.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

__all__ = ["WEIGHTS_SHARE", "available_bytes", "holds", "keep_freed_memory"]

WEIGHTS_SHARE = 0.6  # of the available memory, that the weights of a whole model may take

_ROOT = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# Files of a control group: limit, use, and the file pages in `memory.stat`, which the kernel can drop.
# Linux: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


_M_TRIM_THRESHOLD = -1  # malloc.h of glibc
_M_MMAP_MAX = -4


def available_bytes() -> int:
    """Bytes that this process can take now: what the machine has, or what a limit of its control groups leaves."""
    return min([psutil.virtual_memory().available, *_left()])


def holds(parameters: int) -> bool:
    """Whether a whole model of so many parameters in float32 fits beside its work."""
    return 4 * parameters <= WEIGHTS_SHARE * available_bytes()


def _left() -> Iterator[int]:
    """Bytes that each limited control group of this process leaves."""
    for directory, (limit, use, pages) in _groups():
        try:
            allowed, used = (int((directory / name).read_text(encoding="ascii")) for name in (limit, use))
            stat = dict(line.split() for line in (directory / "memory.stat").read_text(encoding="ascii").splitlines())
            yield max(0, allowed - used + sum(int(stat.get(name, 0)) for name in pages))
        except (OSError, ValueError):
            continue  # no such group seen from here, or no limit: "max"


def _groups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """Directories of the groups of this process and of all groups around them. A container may see only the root."""
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0":
            root = _ROOT
            files = _V2
        elif "memory" in kinds.split(","):
            root = _ROOT / "memory"
            files = _V1
        else:
            continue
        inner = root / path.lstrip("/")
        for directory in (inner, *inner.parents):
            if directory.is_relative_to(root):
                yield directory, files


def keep_freed_memory() -> bool:
    """Set glibc's malloc for the rest of the process; False if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(_M_MMAP_MAX, 0)) and bool(library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False
