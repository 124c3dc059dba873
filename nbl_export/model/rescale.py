"""Moves scales between matrices of a decoder layer without a change of what the layer computes.

    norm ── x ──► q, k, v            norm weight / s      columns of q, k, v    * s
    norm ── x ──► gate, up           norm weight / s      columns of gate, up   * s
    v    ── x ──► o                  rows of v / s        columns of o          * s     one s a key/value channel
    up   ── x ──► down               rows of up / s       columns of down       * s

The products stay the same; the values that a quantiser rounds do not (Lin et al., AWQ, 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nbl_export.model.linearize import architecture_of

__all__ = ["Group", "groups_of", "rescale"]


@dataclass(frozen=True)
class Group:
    """Matrices that read one value x, and the module that makes x.

    Attributes:
        name: of the group in the model: layer and first reader.
        layer: index of the decoder layer.
        readers: read x [..., K].
        maker: a norm, or the matrix whose `rows` make x.
        rows: rows of the maker, if it is a matrix.
        offset: what the norm adds to its weight (Gemma: 1).
        repeats: query heads that share a key/value head; x repeats the channels of the maker so many times.
        head_dim: channels of a head, if heads are shared.
    """

    name: str
    layer: int
    readers: tuple[nn.Linear, ...]
    maker: nn.Module
    rows: slice = field(default_factory=lambda: slice(None))
    offset: float = 0.0
    repeats: int = 1
    head_dim: int = 1

    def spread(self, scale_C: torch.Tensor) -> torch.Tensor:
        """The scale of each channel of x [K], from that of each channel of the maker [C]."""
        if self.repeats == 1:
            return scale_C
        heads = scale_C.view(-1, 1, self.head_dim)
        return heads.expand(-1, self.repeats, -1).reshape(-1)

    def gathered(self, values_K: torch.Tensor) -> torch.Tensor:
        """The mean of values over the channels of x that come from the same channel of the maker: [C]."""
        if self.repeats == 1:
            return values_K
        return values_K.view(-1, self.repeats, self.head_dim).mean(1).reshape(-1)


def groups_of(model: Any) -> Iterator[Group]:
    """The groups of all layers, in the order of the layers; a post-norm layer has no groups behind a norm."""
    config = model.config
    record = architecture_of(config)
    repeats = config.num_attention_heads // config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = config.num_key_value_heads * head
    for index, layer in enumerate(model.get_decoder().layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{index}"
        fused = record.fused_qkv is not None
        first = (getattr(attention, str(record.fused_qkv)),) if fused else (
            attention.q_proj, attention.k_proj, attention.v_proj)  # fmt: skip
        up = mlp.gate_up_proj if fused else mlp.up_proj
        half = slice(up.weight.shape[0] // 2, None) if fused else slice(None)
        inner = (up,) if fused else (mlp.gate_proj, mlp.up_proj)
        if record.norm_before is not None:
            norm = getattr(layer, record.norm_before)
            yield Group(f"{name}.qkv", index, first, norm, offset=record.norm_offset)
        yield Group(f"{name}.o", index, (attention.o_proj,), first[-1], slice(-kept, None) if fused else slice(None),
                    repeats=repeats, head_dim=head)  # fmt: skip
        if record.norm_mlp is not None:
            yield Group(f"{name}.mlp", index, inner, getattr(layer, record.norm_mlp), offset=record.norm_offset)
        yield Group(f"{name}.down", index, (mlp.down_proj,), up, half)


def rescale(model: Any, scales: Mapping[str, torch.Tensor]) -> None:
    """Move the scales [C] of groups, by name, in place; groups without a scale stay.

    Raises:
        KeyError: a scale is of no group.
    """
    groups = {group.name: group for group in groups_of(model)}
    with torch.no_grad():
        for name, scale in scales.items():
            _move(groups[name], scale)


def _move(group: Group, scale_C: torch.Tensor) -> None:
    for reader in group.readers:
        reader.weight.mul_(group.spread(scale_C))
    maker: Any = group.maker
    if isinstance(maker, nn.Linear):
        maker.weight[group.rows].div_(scale_C[:, None])
        if maker.bias is not None:
            maker.bias[group.rows].div_(scale_C)
    else:
        maker.weight.add_(group.offset).div_(scale_C).sub_(group.offset)
