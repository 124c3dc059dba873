"""An NBL checkpoint, which already has replaced layers (`nbl-export convert`), as the model of a job.

    config.json, nbl_replaced_layers and nbl_tap  ─►  the plan
    self_attn.* of the replaced layers            ─►  the maps
    all else, with attention weights of zeros     ─►  a stock checkpoint (`hf.restored`), which exporters read

An NBL checkpoint lacks the removed attention weights. So no map can be fitted, and quality loss against the original
cannot be measured. Speed can be measured, since zeros take as long as other weights.
"""

from __future__ import annotations

import re
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.mixers import kind_of
from nbl_export.mixers.base import Mixer
from nbl_export.model.checkpoint.source import Linearized
from nbl_export.records.plan import Plan

__all__ = ["load"]

_TENSOR = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(.+)$")


def load(source: Any, num_layers: int) -> tuple[Plan, dict[int, Mixer]]:
    """Plan and maps of an NBL checkpoint. Maps, [D, D] and [D], are float32, whatever the stored type.

    Raises:
        CorruptError: the weights hold maps of other layers than config.json names.
    """
    from safetensors import safe_open

    replaced: Linearized = source.linearized
    kinds = dict(zip(replaced.layers, replaced.kinds, strict=True))
    found: dict[int, dict[str, Any]] = {}
    for file in source.weights:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                match = _TENSOR.search(name)
                if match and (int(match[1]) in kinds or match[2].startswith("linear.")):
                    found.setdefault(int(match[1]), {})[match[2]] = tensors.get_tensor(name).float().numpy()
    try:
        maps = {i: kind_of(kind).from_module(found.get(i, {}), replaced.size) for i, kind in kinds.items()}
    except KeyError:
        maps = {}
    if not maps or not found.keys() <= kinds.keys():
        raise CorruptError(
            f"{source.directory}: config.json names maps of layers {list(replaced.layers)}, the weights hold maps of "
            f"{sorted(found)}; fetch the model again"
        )
    return Plan(num_layers, replaced.layers, replaced.tap, "given", kinds=replaced.kinds), maps
