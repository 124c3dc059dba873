"""Freed memory stays in the process: the same block again costs no page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

_SCRIPT = """
import resource, sys
from nbl_export.model.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    b"x" * (64 * 2**20)
    print(faults() - before)
"""


def faults(mode: str) -> int:
    """Of the third block of 64 MiB, after two like it were freed."""
    done = subprocess.run([sys.executable, "-c", _SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library is not glibc")
def test_the_same_block_again_costs_no_page_faults() -> None:
    assert faults("plain") > 1000 > 10 > faults("keep")
