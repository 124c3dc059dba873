"""Activation-aware scales: one exponent a group, chosen by the error of the rounded matrices' outputs.

    s = m^a, m the mean magnitude of each channel of x;   a of 0, 0.1, ... 1 with the least
    sum over readers W and rows x of | (Q(W s) / s - W) x |^2,   Q rounds to 4-bit blocks

Channels with large activations are stretched before the rounding, so their weights get finer steps (Lin et al., AWQ,
2023, section 3.2). a = 0 is plain rounding, so no group gets worse on its rows.

`rescale` moves scales between matrices of a layer without a change of what the layer computes:

    norm ── x ──► q, k, v            norm weight / s      columns of q, k, v    * s
    norm ── x ──► gate, up           norm weight / s      columns of gate, up   * s
    v    ── x ──► o                  rows of v / s        columns of o          * s     one s a key/value channel
    up   ── x ──► down               rows of up / s       columns of down       * s

The products stay the same; the values that a quantiser rounds do not (Lin et al., AWQ, 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbl_export.errors import CorruptError
from nbl_export.model.linearize import architecture_of

__all__ = [
    "Choice",
    "Group",
    "Seen",
    "choose",
    "groups_of",
    "load_scales",
    "observe",
    "rescale",
    "rounded",
    "save_scales",
]


_EXPONENTS = tuple(k / 10 for k in range(11))
_LEAST = 1e-4  # of a channel's mean magnitude, relative to the mean of all


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
            model.get_decoder()(input_ids=window.to(model.device), use_cache=False)
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


@dataclass(frozen=True)
class Choice:
    """A group's exponent, its scale [C], and the error of rounding: relative to that of plain rounding."""

    exponent: float
    scale_C: torch.Tensor
    error: float


def choose(
    groups: Iterable[Group], seen: Mapping[str, Seen], block: int, progress: Callable[[int, int], None]
) -> dict[str, Choice]:
    """The best exponent of each group.

    Args:
        block: elements that share a scale in the quantised graph.
    """
    found, all_groups = {}, list(groups)
    with torch.inference_mode():
        for done, group in enumerate(all_groups, 1):
            found[group.name] = _best(group, seen[group.name], block)
            progress(done, len(all_groups))
    return found


def _best(group: Group, seen: Seen, block: int) -> Choice:
    mean_C = group.gathered(seen.mean_K)
    mean_C = mean_C.clamp(min=float(mean_C.mean()) * _LEAST + 1e-30)
    rows_RK = seen.sample_RK
    scales = [(mean_C / mean_C.log().mean().exp()) ** exponent for exponent in _EXPONENTS]
    errors = [_error(group, group.spread(scale), rows_RK, block) for scale in scales]
    best = min(range(len(errors)), key=errors.__getitem__)
    return Choice(_EXPONENTS[best], scales[best].cpu(), errors[best] / max(errors[0], 1e-30))


def _error(group: Group, scale_K: torch.Tensor, rows_RK: torch.Tensor, block: int) -> float:
    total = 0.0
    for reader in group.readers:
        weight = reader.weight.float()
        off = rounded(weight * scale_K, block) / scale_K - weight
        total += float((rows_RK @ off.T).square().sum())
    return total


def rounded(weight_NK: torch.Tensor, block: int) -> torch.Tensor:
    """The matrix in symmetric 4-bit blocks along K, as the GenAI builder rounds.

    The element of largest magnitude in a block becomes the code -8. Columns beyond the last whole block form a block.
    """
    rows, columns = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK, (0, -columns % block)).view(rows, -1, block)
    peak = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    step = torch.where(peak == 0, torch.ones_like(peak), peak / -8)
    codes = (padded / step).round().clamp(-8, 7)
    return (codes * step).view(rows, -1)[:, :columns]


def save_scales(scales: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write the scales [C] of groups, by the group's name."""
    from safetensors.torch import save_file

    save_file({name: scale.contiguous() for name, scale in scales.items()}, path, metadata={"format": "nbl-scales-1"})


def load_scales(path: Path) -> dict[str, torch.Tensor]:
    """Read the scales.

    Raises:
        CorruptError: the file cannot be read, or a scale is not positive.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        scales: dict[str, torch.Tensor] = load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); delete it to have it made again") from error
    if not all(bool((scale > 0).all()) for scale in scales.values()):
        raise CorruptError(f"{path} holds a scale that is not positive; delete it to have it made again")
    return scales


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
    """The groups of all layers, in the order of the layers.

    A post-norm layer, and a norm without weights, have no groups behind a norm. Experts have no groups. An MLP without
    a gate has none behind its activation, and clipped values none behind attention.
    """
    config = model.config
    record = architecture_of(config)
    repeats = config.num_attention_heads // config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kept = config.num_key_value_heads * head
    for index, layer in enumerate(model.get_decoder().layers):
        attention, name = layer.self_attn, f"layers.{index}"
        fused = record.fused_qkv is not None
        first = (getattr(attention, str(record.fused_qkv)),) if fused else (
            attention.q_proj, attention.k_proj, attention.v_proj)  # fmt: skip
        if (norm := _norm(layer, record.norm_before)) is not None:
            yield Group(f"{name}.qkv", index, first, norm, offset=record.norm_offset)
        if getattr(config, "clip_qkv", None) is None:
            rows = slice(-kept, None) if fused else slice(None)
            yield Group(f"{name}.o", index, (attention.o_proj,), first[-1], rows, repeats=repeats, head_dim=head)
        if record.experts is not None:
            continue
        mlp = getattr(layer, record.mlp)
        inner = tuple(getattr(mlp, matrix) for matrix in record.mlp_in)
        if (norm := _norm(layer, record.norm_mlp)) is not None:
            yield Group(f"{name}.mlp", index, inner, norm, offset=record.norm_offset)
        if record.mlp_gated:
            half = slice(inner[-1].weight.shape[0] // 2, None) if len(inner) == 1 else slice(None)
            yield Group(f"{name}.down", index, (getattr(mlp, record.mlp_out),), inner[-1], half)


def _norm(layer: Any, name: str | None) -> Any:
    """The norm of that name; None if the layer has none, or one without weights."""
    norm = getattr(layer, name) if name else None
    return norm if getattr(norm, "weight", None) is not None else None


def rescale(model: Any, scales: Mapping[str, torch.Tensor]) -> None:
    """Move the scales [C] of groups, by name, in place; groups without a scale stay.

    Raises:
        KeyError: a scale is of no group.
    """
    groups = {group.name: group for group in groups_of(model)}
    with torch.no_grad():
        for name, scale in scales.items():
            _move(groups[name], scale.to(model.device))


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
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(scale_C)
