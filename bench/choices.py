"""Orders of layers and the cost model that the modes of `quality.py` share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from bed import Bed, log

__all__ = ["cost_model", "dropped", "judged"]


def judged(bed: Bed, maps: Mapping[int, Any], count: int, tap: str) -> tuple[Any, float]:
    """The sets of layers in the order that nbl-export chooses by trials, and the seconds of the choice."""
    from nbl_export.measure.cost import map_sizes
    from nbl_export.model import bfloat16
    from nbl_export.model.switched import SwitchedModel
    from nbl_export.plan.greedy import Judge, Search

    costs, sizes = cost_model(bed), map_sizes(maps)
    saved: Any = lambda gone: costs.prefill_saved({i: sizes[i] for i in gone})  # noqa: E731
    started, narrow = time.monotonic(), bfloat16.fast(bed.model.device)
    judge = Judge(SwitchedModel(bed.model, maps, tap, narrow=narrow), bed.judging)
    steps = Search(judge, (), saved, lambda _d, _t: None).extend(count)
    seconds = time.monotonic() - started
    log(f"{list(steps[-1].layers)} in {seconds:.0f} s")
    return steps, seconds


def cost_model(bed: Bed) -> Any:
    """The cost model of a prefill of 512 tokens in float32."""
    from nbl_export.measure.cost import CostModel
    from nbl_export.model.architectures import mlp_of

    return CostModel(bed.spec, mlp_of(bed.model.config.to_dict()), 4.0, 4.0, 4)


def dropped(maps: Mapping[int, Any]) -> dict[int, Any]:
    from nbl_export.mixers.none import Nothing

    return {i: Nothing(m.size) for i, m in maps.items()}
