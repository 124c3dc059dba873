"""bfloat16 products, if the processor has native ones; everything else of a model stays float32 (autocast).

Attention of short bfloat16 rows on a CPU as two products and a softmax, instead of one fused operator.

Within `ShortAttention()`, it replaces torch's scaled_dot_product_attention in one case: plain causal attention of at
most 256 tokens, on a CPU, under autocast to bfloat16. For 4 rows of 256 tokens and 9 heads of 64, forward and backward
of the fused operator (torch 2.13) take 22 ms. Most of this time is backward. Separate products take 9 ms, and shorten
a distillation step by a tenth (bench/EXPERIMENTS.md). From 512 tokens on, both take equally long, and separate products
take more memory.

Scores are rounded to bfloat16 before the softmax; the fused operator rounds its result. Gradients of a training step
are as near to float32 as with the fused operator, except for rows that bfloat16 turns in either case
(bench/EXPERIMENTS.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from nbl_export.errors import NblError

__all__ = ["Weights", "chosen", "fast", "products"]


_LONGEST = 256  # tokens of a row


def fast(device: torch.device) -> bool:
    """Whether bfloat16 products are native: a CPU needs AVX512_BF16 or AMX, a GPU compute capability 8."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions of torch.cpu from torch 2.5 on
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def chosen(dtype: str, device: torch.device) -> bool:
    """Whether products are in bfloat16, for a value of `compute_dtype` (`options.options.DTYPES`).

    Raises:
        NblError: bfloat16 is asked for, and the processor has no such products.
    """
    if dtype == "bfloat16" and not fast(device):
        raise NblError(
            f"key compute_dtype bfloat16: this {'GPU' if device.type == 'cuda' else 'processor'} has no bfloat16 "
            "products (a CPU needs AVX512_BF16 or AMX); use auto or float32"
        )
    return dtype != "float32" and fast(device)


def products(device: torch.device, enabled: bool) -> torch.autocast:
    """Within: products in bfloat16, if enabled; the residual stream, norms and softmax stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


class Weights:
    """bfloat16 copies of a model's frozen matrices. Without copies, autocast converts a matrix for every product.

    The copies add half of the float32 model's memory. Tied embeddings stay float32: only products read a copy.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._copies = {m: nn.Parameter(m.weight.detach().to(torch.bfloat16), requires_grad=False) for m in linears}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within: the copies replace the model's weights."""
        kept = {module: module.weight for module in self._copies}
        try:
            for module, copy in self._copies.items():
                module.weight = copy
            yield
        finally:
            for module, weight in kept.items():
                module.weight = weight


class ShortAttention(TorchFunctionMode):
    """Within: short attention takes separate products, as described above."""

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is scaled_dot_product_attention and _suits(*args, **kwargs):
            return _attention(*args, **kwargs)
        return function(*args, **kwargs)


def _suits(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **_others: Any,
) -> bool:  # fmt: skip
    tokens, device = query.shape[-2], query.device.type
    short = tokens == key.shape[-2] == value.shape[-2] and tokens <= _LONGEST
    narrow = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return device == "cpu" and short and narrow and is_causal and attn_mask is None and not dropout_p


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_suited: Any, scale: float | None = None,
    enable_gqa: bool = False, **_others: Any,
) -> torch.Tensor:  # fmt: skip
    """query [B, H, T, S], key and value [B, H or its groups, T, S] -> [B, H, T, S] in bfloat16."""
    tokens, size = query.shape[-2:]
    with torch.autocast("cpu", enabled=False):  # autocast's float32 softmax takes twice the time
        query = (query * (size**-0.5 if scale is None else scale)).bfloat16()
        key, value = key.bfloat16(), value.bfloat16()
        if enable_gqa:
            each = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
        later = torch.full((tokens, tokens), -torch.inf, dtype=torch.bfloat16).triu_(1)
        return (query @ key.mT).add_(later).softmax(-1) @ value
