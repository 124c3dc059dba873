"""One pass of a torch model over a text, in batches, whose hooks add to sums; activations are never kept.

    rows ─► batches ─► the decoder without its head ─► hooks of a method ─► sums ─► `sums_file`

Several processes share the batches of a text (`model.processes`); rank 0 has the sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nbl_export.methods.sums_file import SumsFile
from nbl_export.model import bfloat16

__all__ = ["BATCH_TOKENS", "Collector", "batches"]

BATCH_TOKENS = 4096


def batches(ids_WT: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split rows of token ids [rows, tokens] into the batches that run at once."""
    return ids_WT.split(max(1, BATCH_TOKENS // ids_WT.shape[1]))


class Collector(ABC):
    """Sums of a torch model, hooked to it while the context is open.

    Args:
        model: a causal LM of transformers, float32.
        bf16: the model's products in bfloat16; products of the sums are float32.
    """

    def __init__(self, model: Any, *, bf16: bool = False) -> None:
        self._model = model
        self._bf16 = bf16
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        self._handles += self.hooks()
        return self

    def __exit__(self, _k: type[BaseException] | None, _v: BaseException | None, _t: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def run(self, batch_BT: torch.Tensor) -> None:
        """Run the decoder without its head on token ids [B, T]."""
        with torch.inference_mode(), bfloat16.bf16_autocast(self._model.device, self._bf16):
            self._model.get_decoder()(input_ids=batch_BT.to(self._model.device), use_cache=False)

    @property
    @abstractmethod
    def count(self) -> int:
        """Rows in the sums."""

    @abstractmethod
    def hooks(self) -> list[Any]:
        """Set the hooks; returns their handles."""

    @abstractmethod
    def begin(self, ids_WT: torch.Tensor) -> None:
        """Agree with all processes on what sums are about, before the first batch of all rows or after `restore`."""

    @abstractmethod
    def add(self, batch_BT: torch.Tensor | None) -> None:
        """Run a batch and add its rows; None in a turn in which only other processes have one."""

    @abstractmethod
    def meet(self) -> None:
        """Give rank 0 the sums of all processes."""

    @abstractmethod
    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the sums, with `facts` but the count.

        Raises:
            NblError: activations are not finite.
        """

    @abstractmethod
    def restore(self, file: SumsFile) -> None:
        """Go on from sums that `save` wrote of the same text and model."""

    def by_layer(
        self,
        ids_WT: torch.Tensor,
        path: Path,
        facts: dict[str, Any],
        scratch: Path,
        progress: Callable[[int, int], None],
    ) -> None:
        """As `begin`, `add` of all batches and `save`, for a model with one layer in memory (`model.mapped`).

        Args:
            scratch: a directory for hidden states, 8 x tokens x hidden size bytes.
            progress: called with tokens done in all layers, and the total.
        """
        raise NotImplementedError
