"""A checkpoint of the same model quantised by GPTQ, AWQ or Olive, whose codes int4 graphs use.

The GenAI builder takes codes, scales and zero points unchanged. Moments, maps and verification use the model of
--model. Both checkpoints must agree in the tensors that both hold in floating point.

The norms of an AWQ checkpoint must belong to its matrices:

    norm' = norm / s      W' = W s      what the norm loses, the columns of the matrices behind it gain

AWQ scales columns and divides the norm before them by the same scale. A tool that saves the scaled matrices with the
old norms (auto-round 0.16.1) writes a checkpoint that computes something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import NblError
from nbl_export.methods.checkpoint import load, source
from nbl_export.model.checkpoint.pretrained import explained, read_config
from nbl_export.records.decoder import DecoderSpec

__all__ = ["METHODS", "check_same", "describe", "find"]

# quant_method in config.json, as transformers and the GenAI builder (0.18, models/loaders/quant_model.py) name them.
METHODS = ("gptq", "awq", "olive")
_BITS = 4  # of MatMulNBits on the CPU
_BLOCKS = (16, 32, 64, 128, 256)
_ROUNDING = 1e-2  # bfloat16 has 8 bits
_ROWS = 256  # rows of a matrix that are compared
# Eight zero points of 8 in an int32. The GPTQ format stores zero points minus 1, and the builder adds 1. GPTQModel 5
# stores zero points unchanged, and does not always say so (vllm-project/vllm#38966).
_EIGHTS = -0x77777778


_BEHIND = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}
_OUTPUTS = 64  # outputs of a matrix that are read: rounding then moves a column's scale by about 1%
_LIMIT = 0.05  # of the median of |log(scale of a column times ratio of the norms)|
_AWQ = ("qweight", "qzeros", "scales")
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the eight columns of an int32 are, four bits each


def find(name: str, spec: DecoderSpec) -> source.Source:
    """Find the quantised checkpoint and check its config.json.

    Args:
        spec: sizes of the model of --model, which the checkpoint must have.

    Raises:
        NblError: the checkpoint is missing, not quantised, quantised in an unsupported way, or of another model.
    """
    try:
        found = source.resolve(name)
    except NblError as error:
        raise NblError(f"--quantized-model {name}: {error}") from error
    about = None if found.gguf else _settings(found)
    if about is None or about["method"] not in METHODS:
        what = about["method"] if about else "no quantization_config in a config.json"
        raise NblError(f"--quantized-model {name} is not a checkpoint of {', '.join(METHODS)}: it has {what}")
    if about["bits"] != _BITS or about["group_size"] not in _BLOCKS or about["desc_act"]:
        raise NblError(
            f"--quantized-model {name} has {about['bits']} bits in groups of {about['group_size']}"
            f"{', ordered by activation' if about['desc_act'] else ''}; int4 graphs take {_BITS} bits in groups of "
            f"{', '.join(map(str, _BLOCKS))}, in their own order (desc_act false)"
        )
    theirs = load.read_spec(found)
    other = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(theirs, f.name)]
    if other:
        ours = getattr(spec, other[0])
        its = getattr(theirs, other[0])
        raise NblError(f"--quantized-model {name} is another model: {other[0]} is {its}, and {ours} in --model")
    return found


def _settings(found: source.Source) -> dict[str, Any] | None:
    given = read_config(found.directory).get("quantization_config")
    if not isinstance(given, dict):
        return None
    names = {"method": "quant_method", "bits": "bits", "group_size": "group_size", "desc_act": "desc_act"}
    return {ours: given.get(theirs) for ours, theirs in names.items()}


def describe(found: source.Source) -> dict[str, Any]:
    """Facts for the manifest: title, place, fingerprint, method, bits, group_size."""
    about = _settings(found) or {}
    facts = {key: about.get(key) for key in ("method", "bits", "group_size")}
    return {"title": found.title, "place": found.place, "fingerprint": found.fingerprint, **facts}


def check_same(found: source.Source, original: Path, tap: str) -> None:
    """Compare the tensors that both checkpoints hold in floating point: all outside the layers, and maybe the norms.

    Norms are compared if maps stand behind a norm. AWQ moves scales from the matrices behind a norm into the norm. A
    map in this place was fitted to the output of the original norm.

    Raises:
        NblError: another model, other norms before the maps, norms that do not belong to the matrices of AWQ, or zero
            points in GPTQModel's format.
    """
    with explained(f"--quantized-model {found.name} cannot be compared with the model"):
        _check_same(found, original, tap)


def _check_same(found: source.Source, original: Path, tap: str) -> None:
    theirs = _open(found.weights)
    ours = _open(source.resolve(str(original)).weights)
    zeros = next((file.get_tensor(name) for name, file in theirs.items() if name.endswith(".qzeros")), None)
    if (_settings(found) or {}).get("method") == "gptq" and zeros is not None and bool((zeros == _EIGHTS).all()):
        raise NblError(
            f"--quantized-model {found.name} stores zero points as they are (checkpoint_format gptq_v2), where the "
            "GenAI builder expects one less; save it in the format gptq"
        )
    if (_settings(found) or {}).get("method") == "awq":
        check_norms(theirs, ours, found.name)
    for name in sorted(theirs.keys() & ours.keys()):
        inside = ".layers." in name
        if inside and not (tap == "normed" and name.endswith("norm.weight")):
            continue
        if _differ(theirs[name], ours[name], name):
            advice = (
                "it was quantised with scales in its norms: use the key tap = 'residual'"
                if inside
                else "is it the same one?"
            )
            raise NblError(f"--quantized-model {found.name} has other numbers in {name} than the model; {advice}")


def _open(files: tuple[Path, ...]) -> dict[str, Any]:
    """Tensor name -> an open file that has it."""
    from safetensors import safe_open

    opened = [safe_open(str(file), framework="pt") for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping


def _differ(one: Any, other: Any, name: str) -> bool:
    """Whether the first rows of a tensor differ by more than rounding; False for codes."""
    a = one.get_slice(name)[:_ROWS]
    b = other.get_slice(name)[:_ROWS]
    if not (a.is_floating_point() and b.is_floating_point()):
        return False
    if a.shape != b.shape:
        return True
    a = a.float()
    b = b.float()
    return bool(((a - b).abs() > _ROUNDING * b.abs() + _ROUNDING * b.abs().mean()).any())


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
    """The scale of each column [K]: least squares between the dequantised and the original matrix.

    Raises:
        NblError: the codes, zero points and scales are not those of such a matrix.
    """
    full = ours[f"{matrix}.weight"].get_slice(f"{matrix}.weight")
    outputs, inputs = full.get_shape()
    named = {name: theirs[f"{matrix}.{name}"].get_slice(f"{matrix}.{name}").get_shape() for name in _AWQ}
    groups = max(1, named["scales"][0])
    if inputs % groups or [*named.values()] != [[inputs, outputs // 8], [groups, outputs // 8], [groups, outputs]]:
        raise NblError(
            f"the quantised {matrix} has the shapes {named}, which are not those of [{outputs}, {inputs}] in 4 bits; "
            "quantise the model again"
        )
    wanted = full[:_OUTPUTS].float()
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
