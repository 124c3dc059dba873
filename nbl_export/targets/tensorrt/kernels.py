"""Keeps the kernels that TensorRT-RTX compiles when an engine loads, in engine/model/kernels.cache beside the engine.

Kernels are code, like the plan. The library ignores kernels of another version, GPU or driver
("IRuntimeCache.deserialize"). A file that is not used is replaced when the session closes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from nbl_export.files import read_small, replacing
from nbl_export.trust.contained import is_inside

__all__ = ["KERNELS_FILE", "KernelCache"]

log = logging.getLogger(__name__)

KERNELS_FILE = "kernels.cache"
_MOST_BYTES = 1 << 29


class KernelCache:
    """The kernels of one plan, in a file and in the library."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None
        self._known = b""

    def open(self, runtime_config: Any) -> Any:
        """The library's cache of kernels for all contexts, filled from the file; None if the library makes none.

        Args:
            runtime_config: an `IRuntimeConfig`, which makes the cache.
        """
        self._cache = runtime_config.create_runtime_cache()
        blob = self._read()
        if self._cache is not None and blob and self._cache.deserialize(blob):
            self._known = blob
        else:
            log.info("%s is not used; it is written when the engine closes", self._path)
        return self._cache

    def save(self) -> None:
        """Write the kernels, if new ones were compiled. A failure is a warning, because the file only saves time."""
        cache = self._cache
        self._cache = None
        if cache is None:
            return
        try:
            memory = cache.serialize()
            blob = b"" if memory is None else bytes(memoryview(memory))
            if blob and blob != self._known:
                with replacing(self._path) as stream:
                    stream.write(blob)
        except Exception as error:  # a read-only directory, a full disk, a library that fails after an error of the GPU
            log.warning("the compiled kernels are not kept in %s, the next load compiles again: %s", self._path, error)

    def _read(self) -> bytes:
        """The bytes of the file; none if it cannot be read, or is a link out of its directory."""
        try:
            return read_small(self._path, _MOST_BYTES) if is_inside(self._path, self._path.parent) else b""
        except (OSError, ValueError):
            return b""
