"""Keeps the kernels that TensorRT-RTX compiles when an engine loads, in a file beside the engine.

engine/model/kernels.cache      one line: format, what the kernels were made for, hash        then the library's bytes

A file that was made for another plan, library, GPU or driver is ignored, and so is a damaged one. It is replaced when
the session closes. The library checks its bytes once more ("IRuntimeCache.deserialize": version, GPU and driver must
fit). Kernels are code, like the plan: kernels that this user has neither compiled nor said yes to are ignored too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.files import replacing, stream_sha256
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.tensorrt.record import EngineRecord, read_record
from nbl_export.trust.contained import is_inside
from nbl_export.trust.user_lists import is_own, remember

__all__ = ["KERNELS_FILE", "KernelCache", "made_for", "trust_folder"]

log = logging.getLogger(__name__)

KERNELS_FILE = "kernels.cache"
_FORMAT = "nbl-kernels 1"
_LONGEST_LINE = 10_000  # bytes
_MOST_BYTES = 1 << 29  # of kernels; a longer file has another hash, so it counts as damaged


def made_for(record: EngineRecord, gpu: Gpu) -> dict[str, str]:
    """What the kernels of a plan depend on; a file that names anything else is ignored."""
    return {
        "plan": record.plan_sha256,
        "library": f"{record.engine} {record.version}",
        "GPU": f"{gpu.name} ({gpu.compute})",
        "driver": f"CUDA {gpu.cuda[0]}.{gpu.cuda[1]}",
    }


class KernelCache:
    """The file of kernels of one plan on one GPU.

    Attributes:
        ignored: why the file was not used, as a sentence without a full stop; "" if its kernels are in use.
    """

    def __init__(self, path: Path, wanted: Mapping[str, str]) -> None:
        self._path, self._wanted = path, dict(wanted)
        self._cache: Any = None
        self._known = b""
        self.ignored = "no engine was opened"

    def open(self, runtime_config: Any) -> Any:
        """The library's cache of kernels for all contexts, filled from the file if the file fits.

        Args:
            runtime_config: an `IRuntimeConfig`, which makes the cache.
        """
        cache = runtime_config.create_runtime_cache()
        if cache is None:
            self.ignored = "the library makes no cache of kernels"
            return None
        blob = self._read()
        if not self.ignored and not cache.deserialize(blob):
            self.ignored = "the library does not take it"
        if self.ignored:
            log.info("%s is not used: %s; it is written when the engine closes", self._path, self.ignored)
        else:
            self._known = blob
        self._cache = cache
        return cache

    def save(self) -> None:
        """Write the kernels, if new ones were compiled. A failure is a warning, because the file only saves time."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        try:
            memory = cache.serialize()
            blob = b"" if memory is None else bytes(memoryview(memory))
            if blob and blob != self._known:
                line = {**self._wanted, "sha256": hashlib.sha256(blob).hexdigest()}
                with replacing(self._path) as stream:
                    stream.write(f"{_FORMAT} {json.dumps(line)}\n".encode())
                    stream.write(blob)
                remember(line["sha256"])
        except Exception as error:  # a read-only directory, a full disk, a library that fails after an error of the GPU
            log.warning("the compiled kernels are not kept in %s, the next load compiles again: %s", self._path, error)

    def _read(self) -> bytes:
        """The library's bytes of the file; sets `ignored`."""
        self.ignored = ""
        try:
            if not is_inside(self._path, self._path.parent):
                self.ignored = "it is a link out of its directory"
                return b""
            with self._path.open("rb") as stream:
                line, blob = stream.readline(_LONGEST_LINE), stream.read(_MOST_BYTES)
            found = json.loads(line.decode().removeprefix(f"{_FORMAT} "))
            digest = found.pop("sha256")
        except FileNotFoundError:
            self.ignored = "there is none yet"
            return b""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.ignored = "it is damaged"
            return b""
        other = [name for name, value in self._wanted.items() if found.get(name) != value]
        if other:
            self.ignored = f"it was made for another {other[0]}: {found.get(other[0])}"
        elif digest != hashlib.sha256(blob).hexdigest():
            self.ignored = "it is damaged"
        elif not is_own(digest):
            self.ignored = "its kernels were not compiled by you on this machine"
        return blob


def trust_folder(directory: Path) -> None:
    """Remember the plan of an engine directory, and the kernels beside it, as the user's own.

    Raises:
        NblError: there is no engine, or the list of own engines cannot be written.
        CorruptError: the plan is damaged, or a link leads out of the directory.
    """
    remember(read_record(directory).plan_sha256)
    if (directory / KERNELS_FILE).is_file():
        with (directory / KERNELS_FILE).open("rb") as stream:
            stream.readline(_LONGEST_LINE)
            remember(stream_sha256(stream))
