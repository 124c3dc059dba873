"""One decoder layer at a time, for checkpoints larger than memory.

    hidden states of all batches (scratch file) ─► layer i, loaded alone ─► hidden states ─► layer i + 1 ...
                                                       └─ hooks ─► sums of layer i ─► moments.safetensors

Layers of such a checkpoint are chosen in the same way (`model.streamed`).

A layer runs inside the model's own decoder, built with this one layer. So the same code computes masks and rotary
embeddings. Weights are read tensor by tensor from the safetensors shards. The moments equal the whole model's bit for
bit: the same arithmetic runs on the same batches.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from nbl_export.errors import NblError
from nbl_export.files import safetensors_tensors
from nbl_export.graph.gguf_header import read_header
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.model.checkpoint.pretrained import model_with
from nbl_export.model.checkpoint.source import read_config
from nbl_export.model.checkpoint.weights import weight_files
from nbl_export.model.linearize import architecture_of
from nbl_export.model.memory import WEIGHTS_SHARE, available_bytes

__all__ = ["WeightReader", "float32_bytes", "layer_bytes", "one_layer", "only_head", "refuse_whole", "shortage_of"]

_LAYER = "layers.{}."


class WeightReader:
    """The tensors of a checkpoint directory, read one at a time."""

    def __init__(self, directory: Path) -> None:
        self._files = {name: file for file in weight_files(directory) for name in safetensors_tensors(file)}
        self._prefix = "model." if any(name.startswith("model.") for name in self._files) else ""
        kind = read_config(directory).get("model_type")
        experts = ARCHITECTURES[kind].experts if kind in ARCHITECTURES else None
        self._stored = experts.stored if experts else {}

    def fill(self, module: nn.Module, renamed: Callable[[str], str]) -> None:
        """Give a module's parameters, and the buffers that a checkpoint has, their values in float32.

        Args:
            renamed: a parameter's name in the module -> its name in the checkpoint's decoder.

        Raises:
            NblError: the checkpoint lacks a parameter, or has it in another shape.
        """
        for name, parameter in list(module.state_dict(keep_vars=True).items()):
            value = self._whole(renamed(name), next(iter(parameter.shape), 0))
            if value.shape != parameter.shape:
                raise NblError(
                    f"{renamed(name)} has shape {list(value.shape)}, not {list(parameter.shape)}; fetch the model again"
                )
            owner, _, field = name.rpartition(".")
            if isinstance(parameter, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            setattr(module.get_submodule(owner), field, value)

    def _whole(self, name: str, experts: int) -> torch.Tensor:
        """A weight, of the parts that the checkpoint has: matrices of single experts, gate and up apart."""
        ours = next((end for end in self._stored if name.endswith(end)), None)
        if ours is None or self._has(name):
            return self._get(name)
        parts = []
        for end in self._stored[ours]:
            part = name.removesuffix(ours) + end
            each = [self._get(part.format(k)) for k in range(experts)] if "{}" in part else [self._get(part)]
            parts.append(torch.stack(each) if "{}" in part else each[0])
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _has(self, name: str) -> bool:
        return name in self._files or self._prefix + name in self._files

    def _get(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        full = name if name in self._files else self._prefix + name  # the head is beside the decoder
        if full not in self._files:
            raise NblError(f"the checkpoint lacks the weight {full}; fetch the model again")
        try:
            with safe_open(str(self._files[full]), framework="pt") as file:
                value: torch.Tensor = file.get_tensor(full).to(torch.float32, copy=True)  # not a view of the file
        except (SafetensorError, OSError) as error:
            raise NblError(f"{self._files[full]} lacks {full} or is damaged ({error}); fetch it again") from error
        return value


def float32_bytes(model: Path) -> int:
    """Bytes of all weights of a checkpoint directory or a GGUF file in float32, from the headers alone."""
    if model.is_file():
        return sum(4 * math.prod(shape) for shape in read_header(model).shapes.values())
    return sum(size for _, size in _sizes(model))


def layer_bytes(directory: Path) -> int:
    """Most bytes in float32 of what `one_layer` loads: a layer, and the embedding."""
    layers, embedding = Counter[str](), 0
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


def one_layer(config: Any, index: int, weights: WeightReader) -> Any:
    """The decoder with layer `index` alone. Only layer 0 has the embedding, and only the last layer the final norm."""
    from accelerate import init_empty_weights

    single = copy.deepcopy(config)
    single.num_hidden_layers = 1
    for name in architecture_of(config).per_layer:
        if getattr(config, name, None):
            setattr(single, name, [getattr(config, name)[index]])
    with init_empty_weights(include_buffers=False):  # the rotary frequencies are computed buffers
        decoder = model_with(single, lm_head=False)
    if index < config.num_hidden_layers - 1:
        decoder.norm = nn.Identity()
    if index:
        decoder.embed_tokens = nn.Identity()
    weights.fill(decoder, lambda name: name.replace(_LAYER.format(0), _LAYER.format(index), 1))
    return decoder.eval()


def only_head(config: Any, weights: WeightReader) -> Any:
    """What `head.Head` reads of a causal LM: its configuration and `lm_head`."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        bias = bool(getattr(config, "lm_head_bias", False))
        lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=bias)
    tied = getattr(config, "tie_word_embeddings", False)
    weights.fill(lm_head, lambda name: "embed_tokens.weight" if tied else f"lm_head.{name}")
    return SimpleNamespace(config=config, lm_head=lm_head)


def shortage_of(model: Path, share: float = WEIGHTS_SHARE) -> str:
    """Why a model is too large for a share of the available memory, in words; "" if the model fits."""
    needed, available = float32_bytes(model), available_bytes()
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
