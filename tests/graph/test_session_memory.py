"""Memory of closed sessions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.graph.names import GRAPH_FILE

pytestmark = pytest.mark.process

# Blocks are freed between blocks that stay, as matrices of a closed session are.
FREED = """
import ctypes, re, sys
from pathlib import Path
from nbl_export.graph.session import open_session
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
open_session(Path(sys.argv[1]))
blocks, between = zip(*((libc.malloc(1 << 20), libc.malloc(1 << 12)) for _ in range(300)))
for block in blocks:
    ctypes.memset(block, 1, 1 << 20)
for block in blocks:
    libc.free(block)
before = held()
open_session(Path(sys.argv[1]))
print(before - held())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_what_was_freed_goes_back_to_the_system_before_a_session_opens(exported: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", FREED, str(exported("llama") / GRAPH_FILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 200  # MiB
