"""A contender's process, loaded and waiting; it answers one request at a time."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import threading
from typing import Any

import psutil
from contenders import Contender

__all__ = ["Child", "ChildError"]


class ChildError(Exception):
    """The child could not load, answer or be reached; the message says why."""


class Child:
    """Start the process and wait until its decoder is loaded.

    Args:
        timeout: seconds that an answer may take, loading and compiling included.

    Raises:
        ChildError: it did not load.
    """

    def __init__(self, contender: Contender, threads: int, capacity: int, timeout: float) -> None:
        self.contender = contender
        self._timeout = timeout
        config = {"precision": contender.precision, **contender.config, "threads": threads, "capacity": capacity}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [*contender.command, json.dumps(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env={**environment, **contender.environment}, text=True, bufsize=1,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.facts: dict[str, Any] = self._receive()["ready"]
        except ChildError:
            self.close()
            raise

    def ask(self, **request: Any) -> Any:
        """Send a request and wait for its answer.

        Raises:
            ChildError: it failed, died or took longer than the timeout.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
        except OSError as error:
            raise ChildError(f"its process has ended with status {self._process.wait()}") from error
        return self._receive()

    @property
    def resident_bytes(self) -> int:
        """Memory of the process now."""
        return int(psutil.Process(self._process.pid).memory_info().rss)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty as error:
            raise ChildError(f"no answer within {self._timeout:.0f} s") from error
        if not line:
            raise ChildError(f"its process ended with status {self._process.wait()} (-9 is mostly a lack of memory)")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildError(answer["error"])
        return answer
