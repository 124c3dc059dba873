"""Several processes that share the work of one command, as torchrun starts them.

    rank 0   settles, text ─► share of a stage ─┐ sums, losses ─► writes, next stage ... ─► graphs, verify, bench
    others   wait ──────────► share of a stage ─┘                 wait ...                  ends

torchrun's environment says who a process is. Without it, every function here is that of a single process. All processes
run the same code on the same inputs, and call the functions of the second half in the same order.
Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil

from nbl_export.errors import NblError

if TYPE_CHECKING:
    import torch

__all__ = [
    "all_reduce_sum",
    "any_rank",
    "begin",
    "broadcast_str",
    "count",
    "detach",
    "end",
    "from_first",
    "gather",
    "is_rank0",
    "local",
    "rank",
    "rank_slice",
]

_TIMEOUT = timedelta(hours=1)  # for the longest work of one process between two calls
_SILENT_SECONDS = 5.0  # of waiting for the others before a word
_LONGEST = 128  # bytes of the text that rank 0 broadcasts
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
log = logging.getLogger(__name__)
_threads: list[int] = []  # of torch when the others have ended; empty unless work is shared now


def _number(name: str, otherwise: int) -> int:
    """A number of the environment, if that is of several processes."""
    found = os.environ.get(name, "") if all(each in os.environ for each in _ENVIRONMENT[:4]) else ""
    return int(found) if re.fullmatch("[0-9]{1,9}", found) else otherwise


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return _number("RANK", 0) if _number("WORLD_SIZE", 1) > 1 else 0


def count() -> int:
    """Processes that share the work now."""
    return _number("WORLD_SIZE", 1) if _threads else 1


def local() -> int:
    """Processes of the command on this machine."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def is_rank0() -> bool:
    """Whether this process is rank 0, which has the sums and writes; so is a single process."""
    return not (_threads and rank())


def rank_slice(size: int) -> range:
    """The numbers of this process's items, of so many."""
    return range(rank() if _threads else 0, size, count())


# -- begin and end ---------------------------------------------------------------------------------------------


def begin() -> int:
    """Meet the other processes, if there are any; returns this one's rank.

    Raises:
        NblError: the others do not come, or the environment is none of torchrun's.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1 or _threads:
        return rank()
    if rank() >= size:
        raise NblError(f"RANK is {rank()} and WORLD_SIZE {size}, which torchrun does not set; unset them")
    import torch

    if _is_free():
        torch.set_num_threads(max(1, _cores() // local()))
    _threads.append(_cores() if _is_free() else torch.get_num_threads())
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_number("LOCAL_RANK", 0) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    if rank():  # it writes nothing, so that it can end at any moment without a word
        with contextlib.suppress(ValueError):  # in a thread
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
    others = f"{size - 1} other process{'es' * (size > 2)} at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    waiting = threading.Timer(_SILENT_SECONDS, log.warning, ("waiting for %s", others))
    waiting.start()
    try:
        _together("init_process_group", backend, timeout=_TIMEOUT)
    finally:
        waiting.cancel()
    return rank()


def end() -> None:
    """Tell the others that nothing more is shared; from here on, rank 0 is a single process.

    Raises:
        SystemExit: this is another process.
    """
    if _threads:
        import torch

        if is_rank0():
            broadcast_str()
        _together("destroy_process_group")
        detach()
        torch.set_num_threads(_threads.pop())


def detach() -> None:
    """Leave a command that nobody shares to rank 0, which forgets the others.

    Raises:
        SystemExit: this is another process.
    """
    if rank():
        raise SystemExit(0)
    for name in (*["OMP_NUM_THREADS"] * _is_free(), *_ENVIRONMENT):
        os.environ.pop(name, None)


def _is_free() -> bool:
    """Whether nobody has set a number of threads: torchrun itself sets 1 for several processes."""
    return local() > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1"


def _cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


# -- what all processes call -----------------------------------------------------------------------------------


def _together(function: str, *given: Any, **named: Any) -> None:
    if _threads:
        import torch

        try:
            getattr(torch.distributed, function)(*given, **named)
        except (RuntimeError, ValueError, TypeError) as error:  # gloo's class; those of a port that is none
            raise NblError(
                "another process of this command ended, or cannot be reached at what torchrun's variables say; the "
                "same command goes on after finished stages"
            ) from error


def broadcast_str(text: str = "") -> str:
    """The text of rank 0, in all processes. None goes on before all are here."""
    if not _threads:
        return text
    import torch

    held = torch.zeros(_LONGEST, dtype=torch.uint8)
    if not rank():
        held[: len(text)] = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)
    return bytes(from_first(held).tolist()).rstrip(b"\0").decode("ascii")


def any_rank(found: bool) -> bool:
    """Whether any process has found something. None goes on before all are here."""
    import torch

    return bool(all_reduce_sum(torch.tensor([int(found)])).item())


def from_first(value: torch.Tensor) -> torch.Tensor:
    """The value of rank 0, in place."""
    return all_reduce_sum(value if is_rank0() else value.zero_())


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over processes, in place. The order is free, so only exact sums are equal for every number of processes.

    Rows that one process has filled, and that are zeros elsewhere, are exact.
    """
    _together("all_reduce", value)
    return value


def gather(value: torch.Tensor) -> list[torch.Tensor]:
    """The values of all processes by rank, for rank 0; none for the others."""
    if not _threads:
        return [value]
    import torch

    found = [torch.empty_like(value) for _ in range(count())] if not rank() else []
    _together("gather", value.contiguous(), found or None, 0)
    return found
