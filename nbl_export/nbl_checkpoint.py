"""A checkpoint of which layers are replaced already (`nbl-export save-checkpoint`), as the model of a job.

    config.json, nbl_replaced_layers and nbl_tap  ─►  the plan
    self_attn.linear.{weight,bias}                ─►  its maps
    all else, with attention weights of zeros     ─►  a stock checkpoint (`hf.restored`), of which exporters make both

What attention computed in these layers is not in such a checkpoint. So nothing can be fitted, and the price against
the original cannot be told; speed can, since zeros cost what other weights cost.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from nbl_export.errors import CorruptError, UsageError
from nbl_export.records import AffineMap, JobOptions, Plan

__all__ = ["GIVEN_FIT", "NO_ORIGINAL", "adapted", "check_options", "load"]

GIVEN_FIT = "given"  # the fit of maps that came with the checkpoint
NO_ORIGINAL = "the checkpoint has its maps, and not the attention that they replace"
_MAP = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.linear\.(weight|bias)$")


def adapted(options: JobOptions, source: Any) -> JobOptions:
    """Options of a job on a `checkpoint.Source` that is an NBL checkpoint: its tap and fit. Others as they are.

    Raises:
        UsageError: what is asked for needs the attention that is gone, or another kind of model.
    """
    if source.linearized is None:
        if options.fit == GIVEN_FIT:
            raise UsageError(f"--fit {GIVEN_FIT} is for a checkpoint with maps (nbl-export save-checkpoint)")
        return options
    tap = source.linearized.tap
    if options.fit == "distilled":
        raise UsageError(f"--fit distilled needs the original model: {NO_ORIGINAL}")
    if options.tap not in ("residual", tap):
        raise UsageError(f"--tap {options.tap}: the maps of {options.model} are of the tap {tap}; leave it out")
    changed = dataclasses.replace(options, fit=GIVEN_FIT, tap=tap)
    check_options(changed)
    return changed


def check_options(options: JobOptions) -> None:
    """Refuse what needs the attention that an NBL checkpoint no longer has.

    Raises:
        UsageError: which option.
    """
    wants = {
        "--layers": options.layers is not None, "--select": options.select is not None,
        "--max-perplexity-increase": options.max_perplexity_increase is not None,
        "--target-speedup": options.target_speedup is not None, "--kv-budget": options.kv_budget is not None,
        "--method": options.method != "nbl", "--rank": options.rank is not None, "--shard": options.shard is not None,
        "--data-free": options.data_free, "--layer-wise": options.layer_wise,
    }  # fmt: skip
    asked = [flag for flag, wanted in wants.items() if wanted]
    if asked:
        raise UsageError(f"{asked[0]} needs the original model: {NO_ORIGINAL}; give that one, or leave it out")


def load(source: Any, num_layers: int) -> tuple[Plan, dict[int, AffineMap]]:
    """Plan and maps of an NBL checkpoint; maps [D, D] and [D] in float32, whatever they are stored in.

    Raises:
        CorruptError: the maps of its files are not those that its config.json names.
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
            f"{source.directory}: config.json names maps of layers {list(layers)}, its weights hold those of "
            f"{sorted(found)}; fetch the model again"
        )
    maps = {i: AffineMap(parts["weight"], parts["bias"]) for i, parts in sorted(found.items())}
    return Plan(num_layers, layers, tap, "given"), maps
