"""Calibration one decoder layer at a time, for a checkpoint larger than memory.

    hidden states of all batches (scratch file) ─► layer i, loaded alone ─► hidden states ─► layer i + 1 ...
                                                       └─ hooks ─► sums of layer i ─► moments.safetensors

A layer runs inside the model's own decoder, built with this one layer and without its last norm, so that masks and
rotary embeddings are made by the same code; weights come tensor by tensor out of the safetensors shards. The moments
are those of the whole model bit for bit: the same arithmetic on the same batches.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbl_export.blocks import architecture_of, run_from
from nbl_export.calibrate import attach, refuse_not_finite
from nbl_export.errors import NblError
from nbl_export.pretrained import config_of, model_with
from nbl_export.sums import REFERENCE_ROWS, Accumulator, Sums

__all__ = ["Shelf", "collect_layers", "float32_bytes", "one_layer"]

_LAYER = "layers.{}."


class Shelf:
    """The tensors of a checkpoint directory, one at a time."""

    def __init__(self, directory: Path) -> None:
        index = directory / "model.safetensors.index.json"
        if index.exists():
            where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: directory / file for name, file in where.items()}
        else:
            self._files = {n: file for file in sorted(directory.glob("*.safetensors")) for n in _names(file)}
        self._prefix = "model." if any(name.startswith("model.") for name in self._files) else ""

    def fill(self, module: nn.Module, renamed: Callable[[str], str]) -> None:
        """Give a module's parameters on the meta device their values, in float32.

        Args:
            renamed: a parameter's name in the module -> in the checkpoint's decoder.

        Raises:
            NblError: the checkpoint lacks one of them, or has it in another shape.
        """
        for name, parameter in list(module.named_parameters()):
            value = self._get(renamed(name))
            if value.shape != parameter.shape:
                raise NblError(
                    f"{renamed(name)} has shape {list(value.shape)}, not {list(parameter.shape)}; fetch the model again"
                )
            owner, _, field = name.rpartition(".")
            module.get_submodule(owner)._parameters[field] = nn.Parameter(value, requires_grad=False)

    def _get(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        full = self._prefix + name
        if full not in self._files:
            raise NblError(f"the checkpoint lacks the weight {full}; fetch the model again")
        try:
            with safe_open(str(self._files[full]), framework="pt") as file:
                value: torch.Tensor = file.get_tensor(full).to(torch.float32, copy=True)  # not a view of the file
        except (SafetensorError, OSError) as error:
            raise NblError(f"{self._files[full]} lacks {full} or is damaged ({error}); fetch it again") from error
        return value


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(file), framework="np") as opened:
        return list(opened.keys())


def float32_bytes(directory: Path) -> int:
    """What all weights of a checkpoint directory take in float32, from the headers alone."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, facts in header.items():
            if name != "__metadata__":
                total += 4 * torch.Size(facts["shape"]).numel()
    return total


def collect_layers(
    directory: Path,
    ids_WT: torch.Tensor,
    parts: Sequence[torch.Tensor],
    taps: Sequence[str],
    scratch: Path,
    progress: Callable[[int, int], None],
) -> Iterator[dict[str, Sums]]:
    """Sums of each layer by tap, from the first layer to the last.

    Args:
        directory: config.json and safetensors.
        ids_WT: the whole text, which gives reference rows and units.
        parts: the batches of it to collect, [windows, context] each.
        scratch: a directory for the hidden states: 4 x tokens x hidden size bytes.
        progress: called with layers x tokens done and in all.

    Raises:
        NblError: a weight is missing or damaged, or a layer's activations are not finite.
    """
    config, shelf = config_of(directory), Shelf(directory)
    shapes = [tuple(ids_WT[:1, :REFERENCE_ROWS].shape), *(tuple(part.shape) for part in parts)]
    states = _States(scratch / "hidden", shapes, config.hidden_size)
    inputs = [ids_WT[:1, :REFERENCE_ROWS], *parts]
    tokens = sum(part.numel() for part in parts)
    for index in range(config.num_hidden_layers):
        decoder = one_layer(config, index, shelf)
        found = {tap: Accumulator(config.hidden_size) for tap in taps}
        handles = [handle for tap, a in found.items() for handle in attach(decoder.layers[0], a, tap, config)]
        done = 0
        with torch.inference_mode():
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


def one_layer(config: Any, index: int, shelf: Shelf) -> Any:
    """The decoder with layer `index` alone, ending behind it; with the embedding for the first one only."""
    from accelerate import init_empty_weights

    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    for name in architecture_of(config).per_layer:
        if getattr(config, name, None):
            setattr(single, name, [getattr(config, name)[index]])
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are buffers, and computed
        decoder = model_with(single, lm_head=False)
    decoder.norm = nn.Identity()
    if index:
        decoder.embed_tokens = nn.Identity()
    shelf.fill(decoder, lambda name: name.replace(_LAYER.format(0), _LAYER.format(index), 1))
    return decoder.eval()
