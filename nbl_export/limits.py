"""How close a run's benchmark comes to what this machine allows (`roofline`), for bench.json.

    "limits": [{"rates": of the machine with so many threads, "rows": one for each test and variant of one sequence}]

Only for ONNX Runtime on the CPU, whose rates `roofline.measure_machine` can measure.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import psutil

from nbl_export import cost, roofline
from nbl_export.errors import NblError
from nbl_export.job import Job
from nbl_export.plan import load_maps
from nbl_export.reach import cost_model

__all__ = ["limits_of"]

_BYTES = 2 << 30  # free, where measuring takes 0.6 GB

_rates = functools.cache(roofline.measure_machine)  # a machine is measured once by a process


def limits_of(job: Job, bench: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be added to the value of bench.json.

    Nothing where machine or decoder are not known, or memory is short.
    """
    if job.engine.CAPABILITIES.static or job.options.provider != "cpu":
        return {}
    if psutil.virtual_memory().available < _BYTES:  # a small machine, which measuring would push into its swap
        return {}
    try:
        costs = cost_model(job)
    except NblError:  # the checkpoint is gone, or a graph alone, whose configuration does not say how wide its MLP is
        return {}
    sizes = cost.map_sizes(load_maps(job.run.path / "maps.safetensors", job.plan.replaced))
    found = []
    for threads in bench["threads"]:
        timings = [t for t in bench["timings"] if t["threads"] == threads and t["batch"] == 1]
        if timings:
            rates = _rates(threads)
            rows = roofline.expect(roofline.rows({"timings": timings}, costs, sizes, rates, job.options.precision))
            found.append({"rates": rates.to_json(), "rows": [{"threads": threads, "batch": 1, **row} for row in rows]})
    return {"limits": found} if found else {}
