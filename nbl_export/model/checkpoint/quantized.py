"""A checkpoint of the same model quantised by GPTQ, AWQ or Olive, whose codes int4 graphs use.

The GenAI builder takes codes, scales and zero points unchanged. Moments, maps and verification use the model of
--model. Both checkpoints must agree in the tensors that both hold in floating point.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.model.checkpoint import load, source
from nbl_export.model.checkpoint.awq_norms import check_norms
from nbl_export.records.decoder import DecoderSpec

__all__ = ["METHODS", "check_same", "describe", "find"]

# quant_method in config.json, as transformers and the GenAI builder (0.18, models/loaders/quant_model.py) name them.
METHODS = ("gptq", "awq", "olive")
_BITS, _BLOCKS = 4, (16, 32, 64, 128, 256)  # of MatMulNBits on the CPU
_ROUNDING = 1e-2  # bfloat16 has 8 bits
_ROWS = 256  # rows of a matrix that are compared
# Eight zero points of 8 in an int32. The GPTQ format stores zero points minus 1, and the builder adds 1. GPTQModel 5
# stores zero points unchanged, and does not always say so (vllm-project/vllm#38966).
_EIGHTS = -0x77777778


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
    about = None if found.graph or found.gguf else _settings(found)
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
        ours, its = getattr(spec, other[0]), getattr(theirs, other[0])
        raise NblError(f"--quantized-model {name} is another model: {other[0]} is {its}, and {ours} in --model")
    return found


def _settings(found: source.Source) -> dict[str, Any] | None:
    config = json.loads((found.directory / "config.json").read_text(encoding="utf-8"))
    given = config.get("quantization_config")
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
    theirs, ours = _open(found.weights), _open(source.resolve(str(original)).weights)
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
                "it was quantised with scales in its norms: use --tap residual" if inside else "is it the same one?"
            )
            raise NblError(f"--quantized-model {found.name} has other numbers in {name} than the model; {advice}")


def _open(files: tuple[Path, ...]) -> dict[str, Any]:
    """Tensor name -> an open file that has it."""
    from safetensors import safe_open

    opened = [safe_open(str(file), framework="pt") for file in files]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping


def _differ(one: Any, other: Any, name: str) -> bool:
    """Whether the first rows of a tensor differ by more than rounding; False for codes."""
    a, b = one.get_slice(name)[:_ROWS], other.get_slice(name)[:_ROWS]
    if not (a.is_floating_point() and b.is_floating_point()):
        return False
    if a.shape != b.shape:
        return True
    a, b = a.float(), b.float()
    return bool(((a - b).abs() > _ROUNDING * b.abs() + _ROUNDING * b.abs().mean()).any())
