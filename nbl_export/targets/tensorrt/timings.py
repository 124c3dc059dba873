"""Keeps what TensorRT's builder has timed, so that the next build on this GPU takes its kernels without timing them.

    ~/.cache/nbl-export/timings/VERSION-GPU      the library's bytes; of this user, like the list of own engines

The original's engine and the NBL engine share nearly all of their kernels, and so does a build that is tried again.
TensorRT-RTX times nothing when it builds. Without a GPU nobody has seen what a build saves.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from nbl_export.files import replacing
from nbl_export.targets.gpu import Gpu
from nbl_export.targets.tensorrt.messages import require
from nbl_export.trust.user_lists import cache_file

__all__ = ["begin_with", "keep", "timings_file"]

log = logging.getLogger(__name__)


def timings_file(version: str, gpu: Gpu) -> Path:
    """The file of one version of the library on one kind of GPU."""
    return cache_file().parent / "timings" / re.sub(r"[^\w.-]+", "_", f"{version}-{gpu.name}-{gpu.compute}")


def begin_with(builder_config: Any, path: Path) -> None:
    """Give the builder the timings of a file, if there is one; inside a block of `Messages.explaining`.

    The library compares versions and GPU itself, and ignores what does not fit.
    """
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    require(builder_config.set_timing_cache(require(builder_config.create_timing_cache(known)), False), "timings")


def keep(builder_config: Any, path: Path) -> None:
    """Write the builder's timings. A failure is a note, because the file only saves time."""
    try:
        timed = builder_config.get_timing_cache()
        blob = b"" if timed is None else bytes(memoryview(timed.serialize()))
        if blob:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                stream.write(blob)
    except Exception as error:  # a full disk, a library that fails after an error of the GPU
        log.info("the builder's timings are not kept in %s: %s", path, error)
