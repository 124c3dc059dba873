"""The original and every mix of attention and maps in one torch model.

    layers        0 .. a-1        a .. n-1                    a: the lowest stream that a layer of the mix reads
    mixes    same hidden states | run from `entering` at a    so layers below a are computed once for all mixes

One copy of the weights serves all mixes: during a run, the layers of a mix compute their maps instead of attention. The
model is unchanged afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from nbl_export.mixers.base import Mixer
from nbl_export.mixers.rows import lowest_stream
from nbl_export.model import bfloat16
from nbl_export.model.head import Head
from nbl_export.model.linearize import multiplier_of, run_from, switched
from nbl_export.model.mixes import Mixes, Progress, Runs, quiet

__all__ = ["SwitchedModel"]


class SwitchedModel(Mixes):
    """A causal LM of transformers whose layers are switched between attention and map.

    Args:
        maps: of every layer that a mix may replace.
        tap: what the maps act on (`records.plan.TAPS`).
        narrow: products in bfloat16; logits of the original stay float32.
    """

    most_tokens = 2048

    def __init__(self, model: Any, maps: Mapping[int, Mixer], tap: str, *, narrow: bool = False) -> None:
        self.model, self._narrow = model, narrow
        self._head = Head(model, narrow=narrow)
        self._decoder = model.get_decoder()
        self._layers = self._decoder.layers
        self._tap = tap
        self.num_layers = len(self._layers)
        self._reads = {i: mixer.reads for i, mixer in maps.items()}
        self._modules = {i: m.module(multiplier_of(model.config)).eval().to(model.device) for i, m in maps.items()}

    @property
    def head(self) -> Head:
        return self._head

    def runs(self, ids_WT: torch.Tensor, *, again: bool) -> Runs:
        return _Runs(self, ids_WT, again)

    def first(self, replaced_set: Collection[int]) -> int:
        """The lowest stream that the layers of a mix read."""
        return lowest_stream({i: self._reads[i] for i in replaced_set})

    @torch.no_grad()
    def run(
        self, replaced_set: Collection[int], *, ids_BT: torch.Tensor | None = None,
        entering_BTD: torch.Tensor | None = None, first: int = 0, watch: Collection[int] = (),
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:  # fmt: skip
        """Run a mix on some windows, from their tokens or from the hidden states that enter layer `first`.

        Returns:
            the last hidden states [B, T, D] (after the final norm), and the states that enter the watched layers.
        """
        seen: dict[int, torch.Tensor] = {}

        def note(layer: int) -> Any:
            return lambda _module, args: seen.__setitem__(layer, args[0])

        handles = [self._layers[i].register_forward_pre_hook(note(i)) for i in watch]
        try:
            with (
                bfloat16.products(self.model.device, self._narrow),
                switched(self._decoder, {i: self._modules[i] for i in replaced_set}, self._tap, first),
            ):
                if ids_BT is not None:
                    last = self._decoder(input_ids=ids_BT.to(self.model.device), use_cache=False).last_hidden_state
                else:
                    assert entering_BTD is not None
                    last = run_from(self._decoder, entering_BTD)
        finally:
            for handle in handles:
                handle.remove()
        return last, seen


class _Runs(Runs):
    """The original runs at first use; each mix runs from the original's states at the lowest stream that it reads."""

    def __init__(self, model: SwitchedModel, ids_BT: torch.Tensor, again: bool) -> None:
        self._model, self._ids_BT, self._again = model, ids_BT, again
        self._original: torch.Tensor | None = None
        self._entering: dict[int, torch.Tensor] = {}

    @property
    def original(self) -> torch.Tensor:
        if self._original is None:
            self._begin(())
        assert self._original is not None
        return self._original

    def last(self, replaced_sets: Sequence[Collection[int]], progress: Progress = quiet) -> Iterator[torch.Tensor]:
        firsts = {self._model.first(replaced_set) for replaced_set in replaced_sets if replaced_set}
        if not firsts <= self._entering.keys():
            self._begin(firsts)
        for k, replaced_set in enumerate(replaced_sets):
            if replaced_set:
                first = self._model.first(replaced_set)
                yield self._model.run(replaced_set, entering_BTD=self._entering[first], first=first)[0]
            else:
                yield self.original
            progress(k + 1, len(replaced_sets))

    def _begin(self, firsts: Collection[int]) -> None:
        watch = range(self._model.num_layers) if self._again else firsts
        self._original, self._entering = self._model.run((), ids_BT=self._ids_BT, watch=watch)
