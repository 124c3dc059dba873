"""Collects moments of a model that does not fit into memory, one decoder layer at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nbl_export.calibrate.hooks import attach, refuse_not_finite
from nbl_export.calibrate.sums import REFERENCE_ROWS, Accumulator, Sums
from nbl_export.mixers import DEFAULT
from nbl_export.mixers.base import Kind
from nbl_export.model import bfloat16
from nbl_export.model.blocks import run_from
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.one_layer import WeightReader, one_layer

__all__ = ["Wanted", "collect_layers"]


@dataclass(frozen=True)
class Wanted:
    """What is collected.

    Attributes:
        taps: some of `records.plan.TAPS`.
        kind: of the mixers that the sums are for.
        narrow: the model's products in bfloat16; products of the sums are float32.
    """

    taps: Sequence[str]
    kind: Kind = DEFAULT
    narrow: bool = False


def collect_layers(
    directory: Path,
    ids_WT: torch.Tensor,
    parts: Sequence[torch.Tensor],
    wanted: Wanted,
    scratch: Path,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, Sums]]:
    """Sums of each layer by tap, from the first layer to the last.

    Args:
        directory: holds config.json and safetensors files.
        ids_WT: token ids of the whole text; the first tokens give reference rows and units.
        parts: the batches of the text to collect, [windows, context] each.
        scratch: a directory for the hidden states: 4 x tokens x hidden size bytes.
        progress: called with layers x tokens done and the total.

    Raises:
        NblError: a weight is missing or damaged, or a layer's activations are not finite.
    """
    config, shelf = config_of(directory), WeightReader(directory)
    shapes = [tuple(ids_WT[:1, :REFERENCE_ROWS].shape), *(tuple(part.shape) for part in parts)]
    states = _States(scratch / "hidden", shapes, config.hidden_size)
    sizes = (wanted.kind.feature_count(config.hidden_size), int(config.hidden_size))
    inputs = [ids_WT[:1, :REFERENCE_ROWS], *parts]
    tokens = sum(part.numel() for part in parts)
    for index in range(config.num_hidden_layers):
        decoder = one_layer(config, index, shelf)
        found = {tap: Accumulator(sizes) for tap in wanted.taps}
        handles = [
            handle for tap, a in found.items() for handle in attach(decoder.layers[0], a, tap, config, wanted.kind)
        ]
        done = 0
        with torch.inference_mode(), bfloat16.products(torch.device("cpu"), wanted.narrow):
            for k, ids in enumerate(inputs):
                if index:
                    states.write(k, run_from(decoder, states.read(k)))
                else:
                    states.write(k, decoder(input_ids=ids, use_cache=False).last_hidden_state)
                if k == 0:
                    for accumulator in found.values():
                        accumulator.clear()
                else:
                    done += ids.numel()
                    progress(index * tokens + done, config.num_hidden_layers * tokens)
        for handle in handles:
            handle.remove()
        del decoder
        gc.collect()
        sums = {tap: accumulator.sums() for tap, accumulator in found.items()}
        for value in sums.values():
            refuse_not_finite(value, index)
        yield sums


class _States:
    """Hidden states of every batch in one file, read and written in place."""

    def __init__(self, path: Path, shapes: Sequence[tuple[int, ...]], size: int) -> None:
        self._path, self._shapes, self._size = path, [(*shape, size) for shape in shapes], size
        self._offsets = [0]
        for shape in self._shapes:
            self._offsets.append(self._offsets[-1] + 4 * torch.Size(shape).numel())
        path.touch()

    def read(self, index: int) -> torch.Tensor:
        raw = bytearray(self._offsets[index + 1] - self._offsets[index])
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[index])
            stream.readinto(raw)
        return torch.frombuffer(raw, dtype=torch.float32).view(self._shapes[index])

    def write(self, index: int, states: torch.Tensor) -> None:
        with self._path.open("r+b") as stream:
            stream.seek(self._offsets[index])
            stream.write(memoryview(states.contiguous().numpy()).cast("B"))
