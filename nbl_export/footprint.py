"""What a decoder takes by itself: memory, load time and size on disk.

fresh process: load ─► prompt and a few tokens ─► resident memory ─► load twice more for the time
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from nbl_export.engines.base import TextRunner
from nbl_export.errors import NblError

__all__ = ["Footprint", "OpenRunner", "disk_bytes", "measure_footprint"]

OpenRunner = Callable[[Path, int | None], TextRunner]  # directory, threads

_DECODED = 8  # tokens decoded before memory is read
_LOADS = 3  # load seconds is the median of so many,
_CHEAP_LOAD_SECONDS = 10.0  # unless the first one takes longer than this


@dataclass(frozen=True)
class Footprint:
    """What one decoder alone in a process takes: bytes of resident memory and seconds.

    peak: largest resident set of the process, interpreter and engine library included (about 35 MB before a
    model is loaded); file pages that the engine maps count while they are resident. steady: resident set
    with the model loaded and the sequence in its cache. load: opening the runner, files in the page cache.
    """

    peak_memory_bytes: int
    steady_memory_bytes: int
    load_seconds: float


# kind of file -> its names; what fits none of them is "other"
_KINDS = {
    "engine": ("*.engine",),
    "weights": ("*.data", "*.safetensors", "*.bin"),
    "graph": ("*.onnx",),
    "tokenizer": ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    "settings": ("*.json",),
}


def disk_bytes(directory: Path) -> dict[str, int]:
    """Size of the files of a deployable directory by kind, kinds without a file left out."""
    sizes = dict.fromkeys((*_KINDS, "other"), 0)
    for path in directory.rglob("*"):
        if path.is_file():
            kind = next((k for k, names in _KINDS.items() if any(path.match(name) for name in names)), "other")
            sizes[kind] += path.stat().st_size
    return {kind: size for kind, size in sizes.items() if size}


def measure_footprint(
    open_runner: OpenRunner, directory: Path, threads: int | None, prompt: Sequence[int], capacity: int
) -> Footprint:
    """Load a decoder alone in a fresh process, run the prompt and a few tokens, and read memory there.

    One sequence. capacity: tokens to reserve the cache for, as the timed runs do. The child is gone on return, also
    on Ctrl-C.

    Raises:
        NblError: the runner failed in the child, or the system ended it (out of memory, usually).
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, open_runner, directory, threads, prompt, capacity), daemon=True)
    resource_tracker.ensure_running()  # its start would let interrupts through again, in the middle of ours
    with _interrupts_held():
        child.start()
    there.close()  # the child's copy is the only one left, so its death ends the wait
    try:
        answer = here.recv()
    except EOFError:
        child.join()
        raise NblError(
            f"measuring {directory} failed: the process it was loaded in ended with status {child.exitcode} "
            f"(-9 is mostly a lack of memory: close other programs, or use a smaller precision)"
        ) from None
    finally:
        here.close()
        child.terminate()
        child.join()
    if isinstance(answer, str):
        raise NblError(answer)
    return answer


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. A process started meanwhile never gets it: this one does too, and ends it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(
    out: Connection,
    open_runner: OpenRunner,
    directory: Path,
    threads: int | None,
    prompt: Sequence[int],
    capacity: int,
) -> None:
    try:
        out.send(_footprint(functools.partial(open_runner, directory, threads), prompt, capacity))
    except NblError as error:
        out.send(str(error))


def _footprint(load: Callable[[], TextRunner], prompt: Sequence[int], capacity: int) -> Footprint:
    start = time.perf_counter()
    with load() as runner:
        seconds = [time.perf_counter() - start]
        runner.begin(capacity)
        runner.append(prompt)
        for token in prompt[: min(_DECODED, capacity - len(prompt))]:
            runner.append([token])
        steady = psutil.Process().memory_info().rss
        peak = max(_peak_memory_bytes(), steady)  # the kernel's two counters may differ by a page
    while len(seconds) < _LOADS and seconds[0] < _CHEAP_LOAD_SECONDS:
        start = time.perf_counter()
        with load():
            seconds.append(time.perf_counter() - start)
    return Footprint(peak, steady, statistics.median(seconds))


def _peak_memory_bytes() -> int:
    """Largest resident set so far, of this process's own memory.

    Linux keeps it as VmHWM. Its ru_maxrss is no use here: it starts from the memory of the process that
    started this one (getrusage(2) after execve), which may have held much more.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
