"""Memory of one decoder in a fresh process: load ─► prompt and a few tokens ─► resident memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from nbl_export.child import Child, Write
from nbl_export.errors import NblError
from nbl_export.targets.gpu import free_bytes
from nbl_export.targets.runners import TextRunner

__all__ = ["Footprint", "OpenRunner", "footprint_here", "measure_footprint"]

OpenRunner = Callable[..., TextRunner]  # of a directory and a number of threads
_LONGEST = 1000  # characters of an error from the child
_DECODED = 8  # tokens decoded before memory is read


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory of one decoder alone in a process.

    peak: largest resident set of the process, with interpreter and engine library (about 35 MB before a model is
    loaded). File pages that the engine maps count while they are resident. steady: resident set with the model loaded
    and the sequence in its cache. device: memory that the GPU has less of in the steady state, without the driver's
    context; None without a GPU.
    """

    peak_memory_bytes: int
    steady_memory_bytes: int
    device_memory_bytes: int | None = None


def measure_footprint(
    open_runner: OpenRunner,
    directory: Path,
    threads: int | None,
    prompt: Sequence[int],
    capacity: int,
    gpu: bool = False,
) -> Footprint:
    """Load a decoder alone in a fresh process, run one sequence, and read the memory of that process.

    The child process has ended on return, also after Ctrl-C.

    Args:
        capacity: tokens to reserve the cache for, as the timed runs do.
        gpu: whether the decoder runs on a GPU; only then is the GPU asked for its memory.

    Raises:
        NblError: the runner failed in the child, or a signal ended the child; the message says which.
    """
    with Child(_child, open_runner, directory, threads, list(prompt), capacity, gpu) as child:
        answer = child.answer()
        if answer is None:
            raise NblError(f"measuring {directory} failed: the process that loaded it {child.ending()}")
    if isinstance(answer, str):
        raise NblError(answer)
    return Footprint(*answer)


def _child(
    write: Write,
    open_runner: OpenRunner,
    directory: Path,
    threads: int | None,
    prompt: Sequence[int],
    capacity: int,
    gpu: bool,
) -> None:
    try:
        found = footprint_here(functools.partial(open_runner, directory, threads), prompt, capacity, gpu)
        write(dataclasses.astuple(found))
    except NblError as error:
        write(str(error))
    except MemoryError:
        write(f"measuring {directory} needs more memory: close other programs, or use a smaller precision")
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        write(f"measuring {directory} failed in the process that loaded it: {text[:_LONGEST]}")


def footprint_here(
    load: Callable[[], TextRunner], prompt: Sequence[int], capacity: int, gpu: bool = False
) -> Footprint:
    """The same in this process, whose memory so far counts too."""
    free = free_bytes() if gpu else None
    with load() as runner:
        runner.begin(capacity)
        runner.append(prompt)
        for token in prompt[: min(_DECODED, capacity - len(prompt))]:
            runner.append([token])
        steady = psutil.Process().memory_info().rss
        peak = max(_peak_memory_bytes(), steady)  # the kernel's two counters may differ by a page
        left = None if free is None else free_bytes()
    device = None if free is None or left is None else max(0, free - left)
    return Footprint(peak, steady, device)


def _peak_memory_bytes() -> int:
    """Largest resident set of this process so far, in bytes.

    Linux reports the value as VmHWM. Linux's ru_maxrss starts from the memory of the parent process (getrusage(2)
    after execve), which may be much larger.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
