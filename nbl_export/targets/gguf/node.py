"""The node process that runs llama.cpp (`server.mjs`), and where its package is.

The package is code. It comes only from the absolute path that the user has set, never from the working directory.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError

__all__ = ["PLACE", "Server", "find_packages"]

_PACKAGE = "node-llama-cpp"
_TESTED = "3.22.1"
_SECONDS = 600.0  # for an answer; a large file takes a minute to load
PLACE = "NBL_NODE_LLAMA_CPP"  # environment variable: the directory in which npm installed the package
_INSTALL = f"npm install {_PACKAGE}@{_TESTED} in a directory of your own, and set {PLACE} to its absolute path"


def find_packages() -> Path:
    """The directory whose node_modules holds node-llama-cpp.

    Raises:
        NblError: node or the package is not installed, or the user has not said where.
    """
    if shutil.which("node") is None:
        raise NblError(f"running llama.cpp needs node 20 or newer; then run {_INSTALL}")
    place = os.environ.get(PLACE)
    if not place:
        raise NblError(f"running llama.cpp needs {_PACKAGE}: run {_INSTALL}")
    if not Path(place).is_absolute():
        raise NblError(f"{PLACE} is {place!r}, which is another place in every directory; set it to an absolute path")
    if not (Path(place) / "node_modules" / _PACKAGE / "package.json").is_file():
        raise NblError(f"{PLACE} is {place}, where there is no node_modules/{_PACKAGE}: run {_INSTALL}")
    return Path(place)


class Server:
    """A process with one model, which answers one request at a time.

    Args:
        model: a GGUF file; None loads the library alone.

    Raises:
        NblError: the package is missing, or the file does not load.
    """

    def __init__(self, model: Path | None, threads: int) -> None:
        packages = find_packages()
        settings = {"packages": str(packages), "model": model and str(model.absolute()), "threads": threads}
        self._where = model or _PACKAGE
        script = Path(__file__).with_name("server.mjs")
        self._process = subprocess.Popen(
            ["node", str(script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1, encoding="utf-8", cwd=packages,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.versions: dict[str, str] = self._answer()["ready"]["versions"]
        except NblError:
            self.close()
            raise

    def ask(self, name: str, **values: Any) -> dict[str, Any]:
        """Send a request of `server.mjs` and wait for the answer.

        Raises:
            NblError: the request failed, or the process has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": name, **values}) + "\n")
        except (OSError, ValueError) as error:
            raise NblError(f"{self._where}: llama.cpp's process has ended ({error})") from error
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._lines.put(line)
        except ValueError:  # closed
            pass
        self._lines.put("")

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=_SECONDS)
        except queue.Empty as error:
            raise NblError(f"{self._where}: llama.cpp gave no answer within {_SECONDS:.0f} s") from error
        if not line:
            raise NblError(f"{self._where}: llama.cpp's process ended with status {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise NblError(f"{self._where}: llama.cpp says: {found['error']}")
        return found
