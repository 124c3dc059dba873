"""bfloat16 products, if the processor has native ones; everything else of a model stays float32 (autocast)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nbl_export.errors import NblError

__all__ = ["Weights", "bf16_autocast", "has_native_bf16", "use_bf16"]


def has_native_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are native: a CPU needs AVX512_BF16 or AMX, a GPU compute capability 8."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # functions of torch.cpu from torch 2.5 on
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def use_bf16(dtype: str, device: torch.device) -> bool:
    """Whether products are in bfloat16, for a value of `compute_dtype` (`options.options.DTYPES`).

    Raises:
        NblError: bfloat16 is asked for, and the processor has no such products.
    """
    if dtype == "bfloat16" and not has_native_bf16(device):
        raise NblError(
            f"key compute_dtype bfloat16: this {'GPU' if device.type == 'cuda' else 'processor'} has no bfloat16 "
            "products (a CPU needs AVX512_BF16 or AMX); use auto or float32"
        )
    return dtype != "float32" and has_native_bf16(device)


def bf16_autocast(device: torch.device, enabled: bool) -> torch.autocast:
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
