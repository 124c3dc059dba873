"""Calibration on several processes: `torchrun --nproc-per-node N -m nbl_export calibrate ...`

    process 0   does the job; its batches are dealt out round by round: process r takes every N-th from the r-th on
    others      get the checkpoint's place, the windows and the reference rows from it, and give it their sums

Sums are exact (`sums`), so the result is that of one process. gloo on CPUs; NCCL where there are GPUs.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError

__all__ = ["Peers", "collect_batches", "current", "follow"]

_PATIENCE = datetime.timedelta(hours=12)  # process 0 may have to fetch and dequantise first; torchrun ends who is left


class Peers:
    """The processes of this calibration. Alone, nothing is communicated."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self._led = rank, size, False

    @functools.cached_property
    def _dist(self) -> Any:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        return dist

    def place(self, model: Any) -> Any:
        """The model on this process's device."""
        import torch

        return model.to(torch.cuda.current_device()) if self.size > 1 and torch.cuda.is_available() else model

    def lead(self, order: dict[str, Any] | None) -> None:
        """Process 0: say what there is to do, or None where nothing is; what is said first counts."""
        if self.size > 1 and not self._led:
            self._led = True
            self._dist.broadcast_object_list([order], src=0)

    def receive(self) -> dict[str, Any] | None:
        """What process 0 says."""
        said: list[Any] = [None]
        self._dist.broadcast_object_list(said, src=0)
        order: dict[str, Any] | None = said[0]
        return order

    def agree(self, error: str | None, flag: bool = False) -> bool:
        """Wait for the others. Returns the flag of process 0.

        Raises:
            NblError: one of them has failed.
        """
        said: list[Any] = [(error, flag)]
        if self.size > 1:
            said = [None] * self.size
            self._dist.all_gather_object(said, (error, flag))
        for rank, (failed, _) in enumerate(said):
            if failed is not None:
                raise NblError(failed if self.size == 1 else f"process {rank} of {self.size}: {failed}")
        return bool(said[0][1])

    def share_reference(self, found: Any) -> None:
        """Reference rows and units of process 0 to all."""
        if self.size > 1:
            for accumulator in found.accumulators():
                values = accumulator.reference()
                for value in values:
                    self._dist.broadcast(value, src=0)
                if self.rank:
                    accumulator.start(*values)

    def gather(self, found: Any) -> None:
        """All sums to process 0; the others begin at zero again."""
        if self.size > 1:
            import torch

            for accumulator in found.accumulators():
                tensors = accumulator.tensors()
                count = torch.tensor([accumulator.count], device=tensors[0].device)
                for value in (*tensors, count):
                    self._dist.reduce(value, dst=0)
                accumulator.count = int(count)
                if self.rank:
                    accumulator.clear()

    def close(self) -> None:
        """Release the others if they still wait for something to do."""
        self.lead(None)
        if self.size > 1:
            self._dist.destroy_process_group()


@functools.cache
def current() -> Peers:
    """The processes that torchrun has started, or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Peers(0, 1)
    return Peers(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def collect_batches(
    peers: Peers,
    found: Any,
    parts: Sequence[Any],
    done: int,
    is_due: Callable[[], bool],
    save: Callable[[int], None],
) -> None:
    """Add batches `done` to the last, this process's share of them. In the end process 0 holds the sums of all.

    Args:
        found: a `calibrate.Collection`.
        is_due: whether process 0 wants all sums now, to save them; asked after every round.
        save: called on process 0 with the batches that are in the sums, after every round that was due.
    """
    for first in range(done, len(parts), peers.size):
        error = None
        try:
            if first + peers.rank < len(parts):
                found.add(parts[first + peers.rank])
        except Exception as failed:
            if peers.size == 1:
                raise
            error = f"{type(failed).__name__}: {failed}"
        end = min(first + peers.size, len(parts))
        due = is_due()
        if peers.agree(error, due or end == len(parts)):
            peers.gather(found)
        if due and peers.rank == 0:
            save(end)


def follow(peers: Peers) -> None:
    """Work for process 0 until it has nothing to do any more.

    Raises:
        NblError: a process has failed.
    """
    from nbl_export import calibrate, checkpoint

    order = peers.receive()
    if order is None:
        return
    model, error = None, None
    try:
        model = peers.place(checkpoint.load_model(Path(order["checkpoint"])))
    except Exception as failed:
        error = str(failed)
    peers.agree(error)
    with calibrate.Collection(model, order["taps"]) as found:
        parts = [calibrate.batches(order["windows"])[k] for k in order["batches"]]
        found.refer(order["windows"])
        peers.share_reference(found)
        collect_batches(peers, found, parts, order["done"], lambda: False, lambda _: None)
