"""A checkpoint of the same model that GPTQ, AWQ or Olive quantised: whose codes int4 graphs are made of.

The GenAI builder takes codes, scales and zero points as they are. Moments, maps and the proof stay with the model
that --model names; what it and the quantised one share, they must have in common.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nbl_export import checkpoint
from nbl_export.errors import NblError
from nbl_export.records import DecoderSpec

__all__ = ["METHODS", "check_same", "describe", "find"]

# quant_method in config.json, as transformers and the GenAI builder (0.18, models/loaders/quant_model.py) name them.
METHODS = ("gptq", "awq", "olive")
_BITS, _BLOCKS = 4, (16, 32, 64, 128, 256)  # of MatMulNBits on the CPU
_ROUNDING = 1e-2  # bfloat16 has 8 bits
_ROWS = 256  # of a matrix that are compared
# Eight zero points of 8 in an int32. GPTQ's own format stores one less, and the builder adds it; GPTQModel 5 writes
# them as they are and does not always say so (vllm-project/vllm#38966).
_EIGHTS = -0x77777778


def find(name: str, spec: DecoderSpec) -> checkpoint.Source:
    """The quantised checkpoint, as far as its config.json tells.

    Args:
        spec: of the model it must be.

    Raises:
        NblError: missing, not quantised, in a way that graphs do not have, or of another model.
    """
    try:
        found = checkpoint.resolve(name)
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
    theirs = checkpoint.read_spec(found)
    other = [f.name for f in dataclasses.fields(spec) if getattr(spec, f.name) != getattr(theirs, f.name)]
    if other:
        ours, its = getattr(spec, other[0]), getattr(theirs, other[0])
        raise NblError(f"--quantized-model {name} is another model: {other[0]} is {its}, and {ours} in --model")
    return found


def _settings(found: checkpoint.Source) -> dict[str, Any] | None:
    config = json.loads((found.directory / "config.json").read_text(encoding="utf-8"))
    given = config.get("quantization_config")
    if not isinstance(given, dict):
        return None
    names = {"method": "quant_method", "bits": "bits", "group_size": "group_size", "desc_act": "desc_act"}
    return {ours: given.get(theirs) for ours, theirs in names.items()}


def describe(found: checkpoint.Source) -> dict[str, Any]:
    """Facts for the manifest: title, place, fingerprint, method, bits, group_size."""
    about = _settings(found) or {}
    facts = {key: about.get(key) for key in ("method", "bits", "group_size")}
    return {"title": found.title, "place": found.place, "fingerprint": found.fingerprint, **facts}


def check_same(found: checkpoint.Source, original: Path, tap: str) -> None:
    """Compare the tensors that both have in floating point: all outside the layers; for maps behind a norm, the norms.

    AWQ divides what stands in front of a norm's matrices out of them and into the norm: a map there was fitted to
    what another norm gives.

    Raises:
        NblError: another model, norms that are not those the maps stand behind, or zero points of GPTQModel's format.
    """
    theirs, ours = _open(found.weights), _open(checkpoint.resolve(str(original)).weights)
    zeros = next((file.get_tensor(name) for name, file in theirs.items() if name.endswith(".qzeros")), None)
    if (_settings(found) or {}).get("method") == "gptq" and zeros is not None and bool((zeros == _EIGHTS).all()):
        raise NblError(
            f"--quantized-model {found.name} stores zero points as they are (checkpoint_format gptq_v2), where the "
            "GenAI builder expects one less; save it in the format gptq"
        )
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
    """Whether the first rows of a tensor are not the same but for their rounding; False for codes."""
    a, b = one.get_slice(name)[:_ROWS], other.get_slice(name)[:_ROWS]
    if not (a.is_floating_point() and b.is_floating_point()):
        return False
    if a.shape != b.shape:
        return True
    a, b = a.float(), b.float()
    return bool(((a - b).abs() > _ROUNDING * b.abs() + _ROUNDING * b.abs().mean()).any())
