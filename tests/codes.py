"""Checkpoints quantised to 4 bits by plain rounding, in the formats of GPTQ, AWQ and Olive, written by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

__all__ = ["GROUP", "METHODS", "dequantised", "quantise"]

GROUP = 32
_MAKE_WHOLE = 8  # codes in an int32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight columns stands in the k-th four bits
Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes [out, in], scales and zero points [out, groups]


def _round(weight: torch.Tensor, symmetric: bool) -> Codes:
    blocks = weight.reshape(len(weight), -1, GROUP)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / 15).half().float()
    zeros = torch.full_like(scales, 8) if symmetric else (-low / scales).round().clamp(0, 15)
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return codes.reshape(weight.shape).int(), scales, zeros.int()


def dequantised(weight: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """What the codes of a matrix [out, in] stand for."""
    codes, scales, zeros = _round(weight, symmetric)
    wide = [value.repeat_interleave(GROUP, 1) for value in (scales, zeros)]
    return (codes - wide[1]) * wide[0]


def _eights(codes: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 [..., n / 8] of codes [..., n]."""
    eights = codes.reshape(*codes.shape[:-1], -1, _MAKE_WHOLE)[..., list(order)].long()
    whole = (eights << (4 * torch.arange(_MAKE_WHOLE))).sum(-1)
    return torch.where(whole >= 2**31, whole - 2**32, whole).int()


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _gptq(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "qweight": _eights(codes).T.contiguous(),
        "qzeros": _eights((zeros - 1 & 15).T.contiguous()),  # AutoGPTQ writes one less
        "scales": scales.T.contiguous().half(),
        "g_idx": torch.arange(codes.shape[1], dtype=torch.int32) // GROUP,
    }


def _awq(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "qweight": _eights(codes.T.contiguous(), _AWQ_ORDER),
        "qzeros": _eights(zeros.T.contiguous(), _AWQ_ORDER),
        "scales": scales.T.contiguous().half(),
    }


def _olive(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {"qweight": _pairs(codes), "scales": scales}
    return tensors if (zeros == 8).all() else {**tensors, "qzeros": _pairs(zeros)}


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "olive": _olive,
}


def quantise(checkpoint: Path, out: Path, method: str, *, symmetric: bool = False, **settings: object) -> Path:
    """Copy a checkpoint with the products of its layers quantised.

    Args:
        settings: go into its quantization_config.
    """
    shutil.copytree(checkpoint, out)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(checkpoint / "model.safetensors").items():
        if name.endswith("proj.weight"):
            made = METHODS[method](*_round(tensor.float(), symmetric))
            tensors |= {f"{name.removesuffix('weight')}{key}": value.contiguous() for key, value in made.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    given = {"quant_method": method, "bits": 4, "group_size": GROUP, "desc_act": False, "zero_point": not symmetric}
    config["quantization_config"] = {**given, "symmetric": symmetric, **settings}
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return out
