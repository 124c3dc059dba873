"""Calibration and distillation on several processes: `torchrun --nproc-per-node N -m nbl_export ...`

    process 0   runs the job; batches are dealt out in rounds: process r takes every N-th batch, from batch r on
    others      get the checkpoint's path, the windows and the reference rows from process 0, and return their sums;
                in a distillation each process has its rows of every step; gradients are clipped row by row, then
                averaged (torch's DistributedDataParallel would average before clipping)

Processes exchange JSON and tensors, never pickle. The connections are torch's, neither authenticated nor encrypted, so
they belong on a trusted network.

Sums are exact (`sums`), so the moments equal those of one process. Gradients are not exact, so distilled maps differ by
rounding. CPUs use gloo, GPUs use NCCL.

What arrives is data from any sender; pickle would be code. Values are encoded as JSON and tensors:

    {"windows": tensor, "done": 3}   ->   [["windows", {"tensor": 0}], ["done", 3]] as a "pairs", and [tensor]

Lists and tuples arrive as lists, a dataclass as the dictionary of its fields; keys are text or whole numbers.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.errors import NblError

if TYPE_CHECKING:
    import torch

__all__ = ["ALONE", "Ranks", "collect_batches", "current", "pack", "unpack"]

_PATIENCE = datetime.timedelta(hours=12)  # process 0 may fetch and dequantise first; torchrun ends waiting processes


class Ranks:
    """The processes of this job. A single process communicates nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self._working = rank, size, False

    @functools.cached_property
    def _dist(self) -> Any:
        import torch
        import torch.distributed as dist

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
        return dist

    def place(self, model: Any) -> Any:
        """The model on this process's GPU; one process alone has its model where `--device` says."""
        import torch

        return model.to(torch.cuda.current_device()) if self.size > 1 and torch.cuda.is_available() else model

    def lead(self, order: dict[str, Any] | None) -> None:
        """Process 0: send an order to the others ("work" is a key of `run.pipeline._WORK`); None ends the work."""
        self._working = order is not None
        self.share(order)

    def done(self) -> None:
        """Process 0: the last order is finished, and the others wait for the next."""
        self._working = False

    def share(self, value: Any) -> Any:
        """Send process 0's value to all processes, as JSON and tensors, and return the value."""
        if self.size == 1:
            return value

        text, tensors = pack(value if self.rank == 0 else None)
        shapes = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        header = json.loads(self._broadcast(json.dumps([text, shapes]).encode()))
        if self.rank == 0:
            for tensor in tensors:
                self._broadcast_tensor(tensor)
            return value
        return unpack(header[0], [self._receive_tensor(*shape) for shape in header[1]])

    def _broadcast(self, data: bytes) -> bytes:
        """The bytes of process 0."""
        import torch

        size = torch.tensor([len(data)], device=self._device)
        self._dist.broadcast(size, src=0)
        sent = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.rank == 0
            else torch.empty(int(size), dtype=torch.uint8)
        )
        sent = sent.to(self._device)
        self._dist.broadcast(sent, src=0)
        return bytes(sent.cpu().numpy())

    def _broadcast_tensor(self, tensor: Any) -> None:
        if tensor.numel():
            self._dist.broadcast(tensor.contiguous().to(self._device), src=0)

    def _receive_tensor(self, dtype: str, shape: list[int]) -> Any:
        import torch

        empty = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device)
        self._broadcast_tensor(empty)
        return empty.cpu()

    @property
    def _device(self) -> Any:
        """Device of the tensors in collectives."""
        import torch

        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def _gather(self, value: Any) -> list[Any]:
        """The JSON value of each process, on all processes."""
        import torch

        data = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64, device=self._device) for _ in range(self.size)]
        self._dist.all_gather(sizes, torch.tensor([len(data)], device=self._device))
        longest = max(int(size) for size in sizes)
        mine = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8).to(self._device)
        all_data = [torch.empty_like(mine) for _ in range(self.size)]
        self._dist.all_gather(all_data, mine)
        return [json.loads(bytes(each.cpu().numpy())) for each in all_data]  # JSON allows trailing spaces

    def add(self, *values: float) -> list[float]:
        """Sums over the processes, on all processes."""
        if self.size == 1:
            return list(values)
        everyone = self._gather(values)
        return [sum(column) for column in zip(*everyone, strict=True)]  # added in the same order everywhere

    def average(self, tensors: Sequence[Any]) -> None:
        """Replace tensors by their means over the processes, in place."""
        if self.size == 1:
            return
        import torch

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self._dist.all_reduce(flat)
        for tensor, mean in zip(tensors, (flat / self.size).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def agree(self, error: str | None, flag: bool = False) -> bool:
        """Wait for the others. Returns the flag of process 0.

        Raises:
            NblError: a process has failed.
        """
        said = self._gather((error, flag)) if self.size > 1 else [(error, flag)]
        for rank, (failed, _) in enumerate(said):
            if failed is not None:
                raise NblError(failed if self.size == 1 else f"process {rank} of {self.size}: {failed}")
        return bool(said[0][1])

    def share_reference(self, found: Any) -> None:
        """Send reference rows and units of process 0 to all processes."""
        if self.size > 1:
            for accumulator in found.accumulators():
                values = accumulator.reference()
                for value in values:
                    self._dist.broadcast(value, src=0)
                if self.rank:
                    accumulator.start(*values)

    def gather(self, found: Any) -> None:
        """Add all sums into process 0; the others begin at zero again."""
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
        """Release processes that wait for an order; torchrun ends processes that are still working."""
        if not self._working:
            self.lead(None)
        if self.size > 1:
            self._dist.destroy_process_group()


ALONE = Ranks(0, 1)


@functools.cache
def current() -> Ranks:
    """The processes that torchrun has started, or this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ALONE
    return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def collect_batches(
    ranks: Ranks, found: Any, parts: Sequence[Any], done: int, is_due: Callable[[], bool], save: Callable[[int], None]
) -> None:
    """Add this process's share of the batches from `done` on. At the end process 0 holds the sums of all batches.

    Args:
        found: a `calibrate.collect.Collection`.
        is_due: whether process 0 saves all sums now; asked after every round.
        save: called on process 0 after every due round, with the number of batches in the sums.
    """
    for first in range(done, len(parts), ranks.size):
        error = None
        try:
            if first + ranks.rank < len(parts):
                found.add(parts[first + ranks.rank])
        except Exception as failed:
            if ranks.size == 1:
                raise
            error = f"{type(failed).__name__}: {failed}"
        end = min(first + ranks.size, len(parts))
        due = is_due()
        if ranks.agree(error, due or end == len(parts)):
            ranks.gather(found)
        if due and ranks.rank == 0:
            save(end)


def pack(value: Any) -> tuple[str, list[torch.Tensor]]:
    """JSON text, and the tensors that the text refers to by number.

    Raises:
        TypeError: a value is neither JSON's, nor a tensor, an array or a dataclass.
    """
    tensors: list[torch.Tensor] = []
    return json.dumps(_packed(value, tensors)), tensors


def _packed(value: Any, tensors: list[torch.Tensor]) -> Any:
    import torch

    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        tensors.append((value if isinstance(value, torch.Tensor) else torch.from_numpy(value)).detach())
        return {kind: len(tensors) - 1}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError("a key is neither text nor a whole number")
        return {"pairs": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def unpack(text: str, tensors: Sequence[torch.Tensor]) -> Any:
    """The value that `pack` encoded."""
    return _unpacked(json.loads(text), tensors)


def _unpacked(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "pairs" in value:
        return {key: _unpacked(item, tensors) for key, item in value["pairs"]}
    return tensors[value["tensor"]] if "tensor" in value else tensors[value["array"]].numpy()
