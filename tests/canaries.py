"""Files that leave a trace when somebody runs them, and one that nobody may read.

canary.so            loading it makes TRACES/library
evil.py              importing it makes TRACES/module
pytorch_model.bin    unpickling it makes TRACES/pickle
outside/secret       holds MARK, which must appear nowhere; outside/tokenizer.1.json does too
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["MARK", "Canaries", "put_outside"]

MARK = b"CANARY-5b1f0c9e7d"
_LIBRARY = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void leave_a_trace(void) {
    int file = open(TRACE, O_CREAT | O_WRONLY, 0600);
    if (file >= 0) close(file);
}
"""
_MODULE = """
from pathlib import Path
Path({trace!r}).touch()
class Config: pass
class Model: pass
class Tokenizer: pass
"""


def put_outside(folder: Path) -> None:
    """Files that nobody may open, beside what a command reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_bytes(MARK + bytes(4096))
    (folder / "tokenizer.1.json").write_bytes(b'{"model": "' + MARK + b'"}')


class _Trace:
    """What a pickle of it does when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


class Canaries:
    """Made once in a directory; `plant` puts them into a folder, `touched` names those that left a trace since."""

    def __init__(self, home: Path) -> None:
        self._traces, self._files = home / "traces", home / "canaries"
        self._traces.mkdir(parents=True)
        self._files.mkdir()
        (self._files / "evil.py").write_text(_MODULE.format(trace=str(self._traces / "module")), encoding="utf-8")
        (self._files / "pytorch_model.bin").write_bytes(pickle.dumps(_Trace(self._traces / "pickle")))
        self.has_library = shutil.which("cc") is not None
        if self.has_library:
            source = self._files / "canary.c"
            source.write_text(_LIBRARY, encoding="utf-8")
            trace = f'-DTRACE="{self._traces / "library"}"'
            subprocess.run(["cc", "-shared", "-fPIC", trace, "-o", self._files / "canary.so", source], check=True)
            source.unlink()

    def plant(self, folder: Path) -> None:
        """Into a folder of a stranger."""
        shutil.copytree(self._files, folder, dirs_exist_ok=True)

    def touched(self) -> list[str]:
        """Names of the traces, which are removed."""
        found = sorted(self._traces.iterdir())
        for trace in found:
            shutil.rmtree(trace) if trace.is_dir() else trace.unlink()
        return [trace.name for trace in found]
