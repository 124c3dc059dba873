"""What stands in for the attention of a layer, by `--method`: all of them affine maps, so all else is the same.

    nbl     the fitted map (`lmmse.fit`)                    from moments
    drop    W = 0, b = 0: the layer's attention is left out  from nothing
    wo-wv   W = Wo Wv, b = Wo bv + bo: attention that sees   from the weights
            only its own token, on the normed input

The last two are the baselines that a fitted map is to be judged by (Erdogan et al. 2025 compares with dropping).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nbl_export.architectures import ARCHITECTURES
from nbl_export.records import AffineMap, DecoderSpec

__all__ = ["drop_map", "own_token_map"]


def drop_map(size: int) -> AffineMap:
    """The map to zero, [D, D]."""
    return AffineMap(np.zeros((size, size), np.float32), np.zeros(size, np.float32))


def own_token_map(attention: Any, spec: DecoderSpec, multiplier: float = 1.0) -> AffineMap:
    """What a self-attention module of transformers gives a sequence of one token: values, repeated for their heads.

    Args:
        attention: with o_proj [D, H * head] and v_proj [Hkv * head, D], or a fused projection whose last rows are that;
            each with or without a bias.
        multiplier: what the layer multiplies attention's output with.
    """
    fused = ARCHITECTURES[spec.architecture].fused_qkv
    value, output = getattr(attention, fused or "v_proj"), attention.o_proj
    rows = slice(-spec.num_kv_heads * spec.head_dim, None)
    out_DE = output.weight.detach().double() * multiplier
    weight_ED = _by_query_head(value.weight[rows], spec)
    bias_D = torch.zeros(out_DE.shape[0], dtype=torch.float64)
    if value.bias is not None:
        bias_D = bias_D + out_DE @ _by_query_head(value.bias[rows], spec)
    if output.bias is not None:
        bias_D = bias_D + output.bias.detach().double() * multiplier
    return AffineMap((out_DE @ weight_ED).float().numpy(), bias_D.float().numpy())


def _by_query_head(values: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Rows [Hkv * head, ...] -> [H * head, ...]: query head h reads key/value head h // (H / Hkv)."""
    heads = values.detach().double().unflatten(0, (spec.num_kv_heads, spec.head_dim))
    return heads.repeat_interleave(spec.num_heads // spec.num_kv_heads, 0).flatten(0, 1)
