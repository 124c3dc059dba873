"""Inputs of the matrices of a decoder: mean magnitudes of all tokens, and some rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from nbl_export.model.rescale import Group

__all__ = ["Seen", "observe"]


@dataclass
class Seen:
    """What a group's readers have read.

    Attributes:
        count: tokens. total_K: sum of magnitudes [K]. rows: every `every`-th token [R, K], in parts.
    """

    every: int
    count: int = 0
    total_K: torch.Tensor | None = None
    rows: list[torch.Tensor] = field(default_factory=list)

    def add(self, x_TK: torch.Tensor) -> None:
        """Add the rows of one batch."""
        self.rows.append(x_TK[-self.count % self.every :: self.every].clone())
        total = x_TK.abs().sum(0)
        self.total_K = total if self.total_K is None else self.total_K + total
        self.count += len(x_TK)

    @property
    def mean_K(self) -> torch.Tensor:
        """Mean magnitude of each channel [K]."""
        assert self.total_K is not None
        return self.total_K / self.count

    @property
    def sample_RK(self) -> torch.Tensor:
        """The kept rows."""
        return torch.cat(self.rows)


def observe(
    model: Any, groups: Iterable[Group], ids_WT: torch.Tensor, rows: int, progress: Callable[[int, int], None]
) -> dict[str, Seen]:
    """Run windows of tokens; return what each group's readers read, by the group's name.

    Args:
        rows: how many rows to keep of each input, at most one a token.
    """
    seen = {group.name: Seen(max(1, ids_WT.numel() // rows)) for group in groups}
    with torch.inference_mode(), _hooked(groups, seen):
        for done, window in enumerate(ids_WT.split(4), 1):
            model.get_decoder()(input_ids=window, use_cache=False)
            progress(done, -(-len(ids_WT) // 4))
    return seen


@contextmanager
def _hooked(groups: Iterable[Group], seen: dict[str, Seen]) -> Iterator[None]:
    def keep(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_module: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen[name].add(given[0].detach().float().flatten(0, -2))

        return hook

    with ExitStack() as stack:
        for group in groups:
            handle = group.readers[0].register_forward_pre_hook(keep(group.name))
            stack.callback(handle.remove)
        yield
