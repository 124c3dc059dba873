"""An NBL checkpoint, which already has replaced layers (`nbl-export convert`), as the model of a job.

    config.json, nbl_replaced_layers and nbl_tap  ─►  the plan
    self_attn.linear.{weight,bias}                ─►  the maps
    all else, with attention weights of zeros     ─►  a stock checkpoint (`hf.restored`), which exporters read

An NBL checkpoint lacks the removed attention weights. So no map can be fitted, and quality loss against the original
cannot be measured. Speed can be measured, since zeros take as long as other weights.
"""

from __future__ import annotations

import re
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.records.plan import AffineMap, Plan

__all__ = ["load"]

_MAP = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.linear\.(weight|bias)$")


def load(source: Any, num_layers: int) -> tuple[Plan, dict[int, AffineMap]]:
    """Plan and maps of an NBL checkpoint. Maps, [D, D] and [D], are float32, whatever the stored type.

    Raises:
        CorruptError: the weights hold maps of other layers than config.json names.
    """
    from safetensors import safe_open

    layers, tap = source.linearized.layers, source.linearized.tap
    found: dict[int, dict[str, Any]] = {}
    for file in source.weights:
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no dict
                match = _MAP.search(name)
                if match:
                    value = tensors.get_tensor(name).float().numpy()
                    found.setdefault(int(match[1]), {})[match[2]] = value
    if tuple(sorted(found)) != layers or any(len(parts) != 2 for parts in found.values()):
        raise CorruptError(
            f"{source.directory}: config.json names maps of layers {list(layers)}, the weights hold maps of "
            f"{sorted(found)}; fetch the model again"
        )
    maps = {i: AffineMap(parts["weight"], parts["bias"]) for i, parts in sorted(found.items())}
    return Plan(num_layers, layers, tap, "given"), maps
