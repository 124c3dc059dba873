"""Checks that the norms of an AWQ checkpoint belong to its matrices.

    norm' = norm / s      W' = W s      what the norm loses, the columns of the matrices behind it gain

AWQ scales columns and divides the norm before them by the same scale. A tool that saves the scaled matrices with the
old norms (auto-round 0.16.1) writes a checkpoint that computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbl_export.errors import NblError

__all__ = ["check_norms"]

_BEHIND = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}
_OUTPUTS = 64  # outputs of a matrix that are read: rounding then moves a column's scale by about 1%
_LIMIT = 0.05  # of the median of |log(scale of a column times ratio of the norms)|
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight columns of an int32 are, four bits each


def check_norms(theirs: Mapping[str, Any], ours: Mapping[str, Any], title: str) -> None:
    """Compare norms and matrices of an AWQ checkpoint with the original's.

    Args:
        theirs, ours: tensor name -> an open safetensors file that has it.

    Raises:
        NblError: a norm does not belong to the matrix behind it.
    """
    for name in sorted(ours):
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        matrix = f"{prefix}.{_BEHIND.get(last, '')}"
        if last not in _BEHIND or name not in theirs or f"{matrix}.qweight" not in theirs:
            continue
        scale = _columns(theirs, ours, matrix)
        ratio = theirs[name].get_tensor(name).float() / ours[name].get_tensor(name).float()
        away = float((scale * ratio).abs().clamp(min=1e-9).log().abs().median())
        if not away <= _LIMIT:
            raise NblError(
                f"--quantized-model {title} has scales in {matrix} that are not in {name}, so it computes another "
                "function; quantise the model again, with a tool that writes its norms"
            )


def _columns(theirs: Mapping[str, Any], ours: Mapping[str, Any], matrix: str) -> torch.Tensor:
    """The scale of each column [K]: least squares between the dequantised and the original matrix."""
    wanted = ours[f"{matrix}.weight"].get_slice(f"{matrix}.weight")[:_OUTPUTS].float()
    found = _dequantised(theirs, matrix)[:, : len(wanted)].T
    return (found * wanted).sum(0) / wanted.square().sum(0).clamp(min=1e-30)


def _dequantised(theirs: Mapping[str, Any], matrix: str) -> torch.Tensor:
    """The first outputs of a matrix in AWQ's format: [K, outputs]."""

    def part(name: str, columns: int) -> torch.Tensor:
        full = f"{matrix}.{name}"
        found: torch.Tensor = theirs[full].get_slice(full)[:, :columns]
        return found

    codes, zeros = (_unpacked(part(name, _OUTPUTS // 8)) for name in ("qweight", "qzeros"))
    scales = part("scales", _OUTPUTS).float()
    group = len(codes) // len(scales)
    wide = [value.repeat_interleave(group, 0) for value in (zeros, scales)]
    return (codes - wide[0]) * wide[1]


def _unpacked(eights: torch.Tensor) -> torch.Tensor:
    """Codes [rows, 8 n] of int32 [rows, n]."""
    codes = torch.stack([(eights >> (4 * k)) & 15 for k in _ORDER], -1)
    return codes.flatten(1).float()
