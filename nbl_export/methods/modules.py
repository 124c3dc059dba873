"""Torch modules of mixers, in place of a self-attention module of transformers: (hidden_states, ...) -> (output, None).

Streams of other layers are in `MixerModule.streams` while the decoder runs (`methods.applied`).

A module tells transformers' cache of each token, by one number: transformers reads the past length and the width of
masks from the cache of the first layer of each kind.

A map in training has the closed-form start, and a low-rank delta in the map's own units:

    W' = W + u up down       u = rms(W x + b) / rms(down x)
    b' = b + v shift         v = rms(W x + b)

`up` and `shift` begin at zero. A step of Adam changes a parameter by about the learning rate, whatever the gradient
is. In these units a step of 1e-2 changes the output by about 1% of its size for each direction, in every model. Without
them the same rate was 50 times as large for Qwen2.5-Coder-0.5B as for SmolLM2-135M: the inputs of its maps are six
times as large, and the outputs an eighth as large (bench/EXPERIMENTS.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.model.architectures import block_modules

__all__ = ["MixerModule", "TrainedLinear", "Wrapped", "valid_rows"]


Place = tuple[Any, str, Any]  # owner, attribute and new value

_OVERSAMPLED = 16  # extra singular vectors, so that the wanted singular vectors are exact


class MixerModule(nn.Module):
    """Base of the modules; a subclass gives `mix` if it takes attention's place.

    Args:
        multiplier: the layer's factor of attention's output. A mixer includes it, so the module's output is divided.

    Attributes:
        beside: whether the module stands beside attention, and does not take its place.
        reads: streams of other layers that the mixer reads. streams: their values [B, T, D] in this step.
        layer_idx: index of the layer in the cache; None to use no cache.
    """

    beside = False
    reads: tuple[int, ...] = ()

    def __init__(self, multiplier: float = 1.0) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.layer_idx: int | None = None
        self.streams: dict[int | None, torch.Tensor] = {}

    def mix(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The mixer's output."""
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        self.count_tokens(hidden_states, kwargs.get("cache", kwargs.get("past_key_values")))
        out = self.mix(hidden_states)
        return (out if self.multiplier == 1.0 else out / self.multiplier), None

    @staticmethod
    def places(decoder: Any, modules: Mapping[int, Any], tap: str, *, served: bool) -> Iterator[Place]:
        """What modules of this class change in a decoder.

        Args:
            served: as deployed; False computes every position, as a choice and training need it.

        Raises:
            NblError: a layer cannot have its module.
        """
        for index, module in modules.items():
            layer = decoder.layers[index]
            yield layer, "self_attn", module
            for name in block_modules(decoder.config, tap):
                yield layer, name, nn.Identity()

    def count_tokens(self, x_BTD: torch.Tensor, cache: Any) -> None:
        """Put T more tokens into the cache."""
        if cache is not None and self.layer_idx is not None:
            seen = x_BTD.new_zeros(x_BTD.shape[0], 1, x_BTD.shape[1], 1)
            cache.update(seen, seen, self.layer_idx)


def valid_rows(mask: torch.Tensor, tokens: int) -> torch.Tensor:
    """Which tokens of a step are no padding [B, T], by a mask [B, 1, T, S], boolean or added to scores."""
    own_BT = mask[:, 0].diagonal(mask.shape[-1] - tokens, 1, 2)
    return own_BT if own_BT.dtype == torch.bool else own_BT == 0


class Wrapped(MixerModule):
    """What its module `linear` makes of x [B, T, D]: a linear layer, or a mixer in training (`TrainedLinear`)."""

    def __init__(self, linear: nn.Module, multiplier: float = 1.0) -> None:
        super().__init__(multiplier)
        self.linear: Any = linear

    def mix(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x_BTD)
        return out


class TrainedLinear(nn.Module):
    """x [B, T, D] -> x W'^T + b' [B, T, D], of which `up` [D, R], `down` [R, D] and `shift` [D] are trained.

    A bias of zeros stays zero, because a map without a bias is to have none (`maps` linear).

    rows: own `values` [B, ...] for each row of a batch, which give gradients of each row. None: all rows share one set.
    """

    start: torch.Tensor
    start_bias: torch.Tensor
    units: torch.Tensor  # u and v of the module's docstring

    def __init__(self, linear: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.rows: Mapping[str, torch.Tensor] | None = None
        outputs, inputs = linear.weight.shape
        self.register_buffer("start", linear.weight.detach())
        self.register_buffer("start_bias", linear.bias.detach().clone())
        self.register_buffer("units", torch.ones(2))
        self.biased = bool(self.start_bias.any())
        if self.biased:
            self.shift = nn.Parameter(torch.zeros(outputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.down = nn.Parameter(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))

    @property
    def weight(self) -> torch.Tensor:
        """The weight [D, D], delta included."""
        return self.start + self.units[0] * self.up @ self.down

    @property
    def bias(self) -> torch.Tensor:
        """The bias [D], change included."""
        return self.start_bias + self.units[1] * self.shift if self.biased else self.start_bias

    def values(self, whole: bool) -> dict[str, torch.Tensor]:
        """The trained tensors; with `whole`, the weight [D, D] that they make, alone."""
        return {"weight": self.weight} if whole else dict(self.named_parameters())

    @torch.no_grad()
    def init_lora_from_gradient(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """Set `down` to the first right singular vectors of the gradient [D, D] by `weight`.

        These vectors have norm 1, as random vectors have on average. If the rank is above D, the rest stays random.
        """
        gradient = gradients["weight"]
        count = min(len(self.down), *gradient.shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # svd_lowrank starts at random vectors
            wide = min(count + _OVERSAMPLED, *gradient.shape)
            read_DR = torch.svd_lowrank(gradient.cpu(), q=wide, niter=4)[2]
        self.down[:count] = read_DR[:, :count].T.to(self.down)

    @torch.no_grad()
    def measure(self, x_BTD: torch.Tensor) -> None:
        """Set the units by inputs of the map. Inputs or outputs of zeros leave them at 1."""
        x_BTD = x_BTD.float()
        out, thin = (values.square().mean().sqrt() for values in (self(x_BTD), x_BTD @ self.down.T))
        found = torch.stack([out / thin, out])
        self.units.copy_(torch.where(torch.isfinite(found) & (found > 0), found, torch.ones_like(found)))

    def tensors(self) -> dict[str, np.ndarray]:
        """Weight and bias as trained so far."""
        found = {"weight": self.weight, "bias": self.bias}
        return {name: tensor.detach().cpu().numpy().copy() for name, tensor in found.items()}

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            return nn.functional.linear(x_BTD, self.weight, self.bias)
        if "weight" in self.rows:
            return torch.bmm(x_BTD, self.rows["weight"].mT) + self.bias
        thin = torch.bmm(x_BTD, self.rows["down"].mT)
        out = nn.functional.linear(x_BTD, self.start, self.start_bias)
        out = out + self.units[0] * torch.bmm(thin, self.rows["up"].mT)
        return out + self.units[1] * self.rows["shift"][:, None] if self.biased else out
