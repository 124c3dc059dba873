"""Products in bfloat16 where the processor has them; everything else of a model stays float32 (autocast)."""

from __future__ import annotations

import torch

__all__ = ["fast", "products"]


def fast(device: torch.device) -> bool:
    """Whether products of bfloat16 are native: on a CPU from AVX512_BF16 or AMX, on a GPU from compute capability 8."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu, from 2.5 on
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def products(device: torch.device, enabled: bool) -> torch.autocast:
    """Within: products in bfloat16, if enabled; the residual stream, norms and softmax stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
