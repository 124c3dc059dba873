"""A model larger than memory: each block of it has its weights only while it runs.

    mapped files ─► weights of a block, in float32 ─► the block's own forward ─► weights dropped

Blocks are the embedding, each decoder layer, the final norm and the head. Stages run such a model as any other, and a
run of the model reads each weight once. `in_batches` is for a run of more rows than memory holds: each block takes
batch after batch, and hidden states between two blocks are in a file. So a block computes what it computes in a model
in memory that gets the same batches, bit for bit.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.errors import NblError
from nbl_export.files import safetensors_tensors
from nbl_export.graph.gguf_header import read_header
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.model.checkpoint.pretrained import config_of, model_with, read_config
from nbl_export.model.checkpoint.weights import weight_files
from nbl_export.model.memory import WEIGHTS_SHARE, available_bytes

__all__ = [
    "WeightReader",
    "float32_bytes",
    "in_batches",
    "layer_bytes",
    "mapped_model",
    "on_disk",
    "refuse_whole",
    "shortage_of",
]


def mapped_model(directory: Path, device: Any = "cpu", *, head: bool = False) -> Any:
    """A causal LM of a checkpoint directory, in evaluation mode. No weight is read before a block runs.

    Args:
        head: give the head its weights for good, for readers of the matrix (`head.Head`).
    """
    from accelerate import init_empty_weights

    config = config_of(directory)
    weights = WeightReader(directory)
    device = torch.device(device)
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are computed buffers
        model = model_with(config)
    decoder = model.get_decoder()
    tied = getattr(config, "tie_word_embeddings", False)
    top = _Block(model.lm_head, lambda name: "embed_tokens.weight" if tied else f"lm_head.{name}", weights, device)
    if head:
        top.fill()
        del model.lm_head.forward
    parts = {name: part for name, part in decoder.named_children() if part is not decoder.layers}
    for path, part in [*parts.items(), *((f"layers.{i}", layer) for i, layer in enumerate(decoder.layers))]:
        _Block(part, f"{path}.{{}}".format, weights, device)
    kind = type(model)  # its device would be that of its first weight
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _model: device)})
    return model.eval()


class _Block:
    """The forward of a module that has its weights only meanwhile.

    Args:
        stored: a weight's name in the module -> its name in the checkpoint's decoder.
    """

    def __init__(self, module: nn.Module, stored: Callable[[str], str], weights: WeightReader, device: Any) -> None:
        self._forward = module.forward
        self._weights = weights
        self._device = device
        self.batches: Callable[[Any, Any, Any], torch.Tensor] | None = None
        self._places = []
        for name, empty in module.state_dict(keep_vars=True).items():
            owner, _, field = name.rpartition(".")
            self._places.append((module.get_submodule(owner), field, empty, stored(name)))
        if self._places:
            module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.fill()
            if self.batches is not None:
                return self.batches(self._forward, args, kwargs)
            return self._forward(*args, **kwargs)
        finally:
            for owner, field, empty, _ in self._places:
                setattr(owner, field, empty)

    def fill(self) -> None:
        """Give the module its weights, and the buffers that a checkpoint has.

        Raises:
            NblError: the checkpoint lacks one, or has it in another shape.
        """
        for owner, field, empty, name in self._places:
            value = self._weights.read(name, empty.shape, self._device)
            setattr(owner, field, nn.Parameter(value, False) if isinstance(empty, nn.Parameter) else value)


@contextlib.contextmanager
def in_batches(model: Any, tokens: int, scratch: Path, seen: Callable[[int], None]) -> Iterator[None]:
    """Within: blocks of a mapped model run at most so many tokens at once; what they return is on disk.

    Args:
        scratch: a directory for hidden states, 8 x tokens x hidden size bytes.
        seen: called with the tokens of each batch of each block.
    """

    def run(forward: Any, args: Any, kwargs: Any) -> torch.Tensor:
        entering = args[0] if args else kwargs["hidden_states"]
        count, length = entering.shape[:2]
        leaving: torch.Tensor | None = None
        for rows in torch.arange(count).split(max(1, tokens // length)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            given, named = _rows((args, kwargs), part, count, model.device)
            found = forward(*given, **named)
            if leaving is None:
                leaving = on_disk((count, *found.shape[1:]), scratch)
            leaving[part] = found.cpu()
            seen(len(rows) * length)
        assert leaving is not None
        return leaving

    blocks = [block for module in model.modules() if isinstance(block := vars(module).get("forward"), _Block)]
    try:
        for block in blocks:
            block.batches = run
        yield
    finally:
        for block in blocks:
            block.batches = None


def _rows(value: Any, part: slice, count: int, device: Any) -> Any:
    """Some windows of everything that has a row for each of `count` windows, on a device."""
    if isinstance(value, torch.Tensor):
        return (value[part] if value.ndim > 1 and len(value) == count else value).to(device)
    if isinstance(value, dict):
        return {name: _rows(each, part, count, device) for name, each in value.items()}
    return tuple(_rows(each, part, count, device) for each in value) if isinstance(value, (tuple, list)) else value


def on_disk(shape: Sequence[int], scratch: Path) -> torch.Tensor:
    """Room for float32 numbers in a file without a name. They are in memory as long as there is some.

    Raises:
        OSError: the disk has too little room.
    """
    if 4 * math.prod(shape) > shutil.disk_usage(scratch).free:  # else the process would end at a write
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
    with tempfile.TemporaryFile(dir=scratch) as file:  # the mapping outlives its name
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=tuple(shape)))


class WeightReader:
    """The tensors of a checkpoint directory, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self._files = {name: file for file in weight_files(directory) for name in safetensors_tensors(file)}
        self._prefix = "model." if any(name.startswith("model.") for name in self._files) else ""
        kind = read_config(directory).get("model_type")
        experts = ARCHITECTURES[kind].experts if kind in ARCHITECTURES else None
        self._stored = experts.stored if experts else {}

    def read(self, name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """A weight of the decoder, or of the head, in float32.

        Raises:
            NblError: the checkpoint lacks the weight, or has it in another shape.
        """
        value = self._whole(name, next(iter(shape), 0), device)
        if value.shape != shape:
            raise NblError(f"{name} has shape {list(value.shape)}, not {list(shape)}; fetch the model again")
        return value

    def _whole(self, name: str, experts: int, device: torch.device) -> torch.Tensor:
        """A weight, of the parts that the checkpoint has: matrices of single experts, gate and up apart."""
        ours = next((end for end in self._stored if name.endswith(end)), None)
        if ours is None or self._has(name):
            return self._get(name, device)
        parts = []
        for end in self._stored[ours]:
            part = name.removesuffix(ours) + end
            names = [part.format(k) for k in range(experts)] if "{}" in part else [part]
            each = [self._get(name, device) for name in names]
            parts.append(torch.stack(each) if "{}" in part else each[0])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _has(self, name: str) -> bool:
        return name in self._files or self._prefix + name in self._files

    def _get(self, name: str, device: torch.device) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        full = name if name in self._files else self._prefix + name  # the head is beside the decoder
        if full not in self._files:
            raise NblError(f"the checkpoint lacks the weight {full}; fetch the model again")
        try:
            with safe_open(str(self._files[full]), framework="pt") as file:
                value: torch.Tensor = file.get_tensor(full).to(device)
                return value.to(torch.float32, copy=True)  # not a view of the file
        except (SafetensorError, OSError) as error:
            raise NblError(f"{self._files[full]} lacks {full} or is damaged ({error}); fetch it again") from error


def float32_bytes(model: Path) -> int:
    """Bytes of all weights of a checkpoint directory or a GGUF file in float32, from the headers alone."""
    if model.is_file():
        return sum(4 * math.prod(shape) for shape in read_header(model).shapes.values())
    return sum(size for _, size in _sizes(model))


def layer_bytes(directory: Path) -> int:
    """Most bytes in float32 of a decoder layer and the embedding."""
    layers = Counter[str]()
    embedding = 0
    for name, size in _sizes(directory):
        if found := re.search(r"layers\.\d+\.", name):
            layers[found[0]] += size
        elif "embed_tokens" in name:
            embedding = size
    return max(layers.values(), default=0) + embedding


def stored_type(directory: Path) -> torch.dtype | None:
    """The type of all weights of a checkpoint directory; None if they have several types."""
    found = {facts["dtype"] for _, facts in _headers(directory)}
    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return types.get(found.pop()) if len(found) == 1 else None


def _sizes(directory: Path) -> Iterator[tuple[str, int]]:
    for name, facts in _headers(directory):
        yield name, 4 * torch.Size(facts["shape"]).numel()


def _headers(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in weight_files(directory):
        yield from safetensors_tensors(file).items()


def shortage_of(model: Path, share: float = WEIGHTS_SHARE) -> str:
    """Why a model is too large for a share of the available memory, in words; "" if the model fits."""
    needed = float32_bytes(model)
    available = available_bytes()
    if needed <= share * available:
        return ""
    return f"{needed / 2**30:.1f} GiB in float32, {available / 2**30:.1f} GiB of memory available"


def refuse_whole(model: Path, work: str) -> None:
    """Require that all weights of a model can be in memory at once.

    Raises:
        NblError: they cannot.
    """
    if why := shortage_of(model, 1.0):
        raise NblError(
            f"{work} needs the whole torch model in memory, and its weights take {why}; calibration, the choice of "
            "layers, rewrite and verification run one layer at a time"
        )
