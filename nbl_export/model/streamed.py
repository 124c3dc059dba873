"""Mixes of attention and maps of a model larger than memory, with one decoder layer in memory at a time.

    hidden states of {}  ──┬── layer i ──────────────────► {}         the original
                           └── layer i, map for attention ► {i}       a mix that begins here
    hidden states of {2} ───── layer i ──────────────────► {2}

All mixes go through a layer before the next layer is loaded. Two mixes share their hidden states up to the lowest layer
in which they differ. Hidden states are in memory if they take a small part of it, else in files without a name.

The last layer brings the final norm. The head is loaded when the layers are done, and freed before the next pass.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.errors import NblError
from nbl_export.mixers.base import Mixer
from nbl_export.model import bfloat16
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.head import Head
from nbl_export.model.linearize import multiplier_of, run_from, switched
from nbl_export.model.memory import STATES_SHARE, available_bytes
from nbl_export.model.mixes import Mixes, Progress, Runs, quiet
from nbl_export.model.one_layer import WeightReader, one_layer, only_head

__all__ = ["StreamedModel"]

_BATCH_TOKENS = 2048  # go through a layer at once
_ORIGINAL: frozenset[int] = frozenset()

States = dict[frozenset[int], torch.Tensor]  # replaced layers so far -> hidden states [windows, context, D]


class StreamedModel(Mixes):
    """The mixes of a checkpoint directory.

    Args:
        checkpoint: holds config.json and safetensors files.
        maps: of every layer that a mix may replace.
        tap: what the maps act on (`records.plan.TAPS`).
        scratch: a directory for hidden states; nothing stays there.
        narrow: products in bfloat16; logits of the original stay float32.

    Raises:
        NblError: a map reads the stream of another layer.
    """

    def __init__(
        self, checkpoint: Path, maps: Mapping[int, Mixer], tap: str, scratch: Path, *, narrow: bool = False
    ) -> None:
        self._config, self._weights = config_of(checkpoint), WeightReader(checkpoint)
        for layer, mixer in maps.items():
            if any(read.stream not in (None, layer) for read in mixer.reads):
                raise NblError(f"layer {layer} reads an earlier layer, so the whole model has to fit into memory")
        self._maps, self._tap, self._scratch, self._narrow = maps, tap, scratch, narrow
        self.num_layers = int(self._config.num_hidden_layers)
        self._head: Head | None = None

    @property
    def head(self) -> Head:
        if self._head is None:
            self._head = Head(only_head(self._config, self._weights), narrow=self._narrow)
        return self._head

    def runs(self, ids_WT: torch.Tensor, *, again: bool) -> Runs:
        return _Runs(self, ids_WT, again)

    def space(self, ids_WT: torch.Tensor, count: int) -> _Space:
        """Room for the hidden states of `count` mixes."""
        return _Space((*ids_WT.shape, int(self._config.hidden_size)), count, self._scratch)

    @torch.no_grad()
    def advance(
        self, layer: int, states: States, wanted: Collection[frozenset[int]], ids_WT: torch.Tensor, space: _Space
    ) -> None:
        """Take hidden states through a layer, in place; the mixes in `wanted` leave it.

        Args:
            ids_WT: what enters layer 0.
        """
        self._head = None
        decoder = one_layer(self._config, layer, self._weights)
        for mix, entering in list(states.items()):
            del states[mix]
            replaced_too = mix | {layer}
            if replaced_too in wanted:  # first, since the other one overwrites what enters
                states[replaced_too] = space.new() if mix in wanted else entering
                with switched(decoder, {0: self._module(layer)}, self._tap):
                    self._run(decoder, ids_WT if layer == 0 else entering, states[replaced_too])
            if mix in wanted:
                states[mix] = entering
                self._run(decoder, ids_WT if layer == 0 else entering, entering)

    def _module(self, layer: int) -> Any:
        return self._maps[layer].module(multiplier_of(self._config)).eval()

    def _run(self, decoder: Any, entering: torch.Tensor, leaving: torch.Tensor) -> None:
        """Run one layer, batch by batch; tokens or hidden states enter."""
        for rows in torch.arange(len(entering)).split(max(1, _BATCH_TOKENS // entering.shape[1])):
            with bfloat16.products(torch.device("cpu"), self._narrow):
                if entering.ndim == 2:
                    leaving[rows] = decoder(input_ids=entering[rows], use_cache=False).last_hidden_state
                else:
                    leaving[rows] = run_from(decoder, entering[rows])


class _Runs(Runs):
    """Passes over the weights for some windows.

    The original runs in the first pass. If later passes follow, they begin at their lowest replaced layer, from states
    of the original that the first pass keeps.
    """

    def __init__(self, model: StreamedModel, ids_WT: torch.Tensor, again: bool) -> None:
        self._model, self._ids_WT, self._again = model, ids_WT, again
        self._original: torch.Tensor | None = None
        self._entering: dict[int, torch.Tensor] = {}

    @property
    def original(self) -> torch.Tensor:
        if self._original is None:
            list(self.last(()))
        assert self._original is not None
        return self._original

    def last(self, replaced_sets: Sequence[Collection[int]], progress: Progress = quiet) -> Iterator[torch.Tensor]:
        mixes = [frozenset(replaced_set) for replaced_set in replaced_sets]
        states = self._pass(set(mixes), progress)
        self._original = states.get(_ORIGINAL, self._original)
        yield from (states[mix] if mix else self.original for mix in mixes)

    def _pass(self, mixes: set[frozenset[int]], progress: Progress) -> States:
        """Hidden states behind the last layer: of the mixes, and of the original if this is the first pass."""
        layers, known = range(self._model.num_layers), self._again and self._original is not None
        ways = {layer: _begun(mixes, layer) if known else {_ORIGINAL, *_begun(mixes, layer)} for layer in layers}
        steps = sum(map(len, ways.values()))
        space = self._model.space(self._ids_WT, 1 + len(mixes) + (self._again and not known) * len(layers))
        states: States = {} if known else {_ORIGINAL: space.new()}
        done = 0
        for layer in layers:
            if known and any(min(mix, default=None) == layer for mix in mixes):
                states[_ORIGINAL] = space.new(self._entering.get(layer))
            elif self._again and not known and layer:
                self._entering[layer] = space.new(states[_ORIGINAL])
            if states:
                self._model.advance(layer, states, ways[layer], self._ids_WT, space)
                done += len(ways[layer])
                progress(done, steps)
        return states


def _begun(mixes: Iterable[frozenset[int]], layer: int) -> set[frozenset[int]]:
    """The different mixes up to a layer, without the original."""
    return {frozenset(i for i in mix if i <= layer) for mix in mixes} - {_ORIGINAL}


class _Space:
    """Room for hidden states of one shape: in memory, or in files without a name.

    Args:
        count: tensors that are held at once.

    Raises:
        NblError: neither memory nor the disk has room for them.
    """

    def __init__(self, shape: tuple[int, ...], count: int, scratch: Path) -> None:
        self._shape, self._scratch = shape, scratch
        needed = 4 * count * int(np.prod(shape, dtype=np.int64))
        self._in_memory = needed <= STATES_SHARE * available_bytes()
        free = shutil.disk_usage(scratch).free
        if not self._in_memory and needed > free:
            raise NblError(
                f"hidden states of {count} variants of the model take {needed / 2**30:.1f} GiB, and {scratch} has room "
                f"for {free / 2**30:.1f} GiB; make room there, or choose another --output"
            )

    def new(self, like: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor, with the values of another one if given."""
        if self._in_memory:
            made = torch.empty(self._shape)
        else:
            with tempfile.TemporaryFile(dir=self._scratch) as file:  # the mapping outlives its name
                made = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=self._shape))
        return made if like is None else made.copy_(like)
