"""The float32 twins of graphs that ship: what a CPU can prove of fp16, bf16 and int4 graphs, to the last digit.

    checkpoint ─ static form, float32 ─► original/model.onnx ─ rewrite ─► model/model.onnx      compared with torch
                                                 └─ int4/                        └─ int4/       how coarse int4 is
    finish(twin, precision)  ==  DIR/original/decoder.onnx, DIR/model/decoder.onnx              bit for bit

A twin that agrees with torch, and a shipped graph that is that twin cast, leave nothing unproven but the cast itself.
Where the logits of the last token ship, twins and shipped graphs are pairs (`rewrite.last_token`): those with all
logits are compared with torch and with each other, and each pruned one with what pruning makes of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nbl_export.job import Job
from nbl_export.records import AffineMap, RungResult

__all__ = ["INT4", "build_twins", "check_shipped"]

INT4 = "int4"  # directory of a twin with int4 matrices around float32 arithmetic


def build_twins(job: Job, maps: Mapping[int, AffineMap], rows_VD: np.ndarray | None, out: Path) -> dict[str, Path]:
    """Write both twins with the logits that ship, as a job's own stages do, and `INT4` beside each for an int4 job."""
    from nbl_export.decoders import static
    from nbl_export.engines.onnx_decoder import GRAPH_FILE
    from nbl_export.rewrite import rewrite
    from nbl_export.rewrite.last_token import keep_last_token

    directories = {"original": out / "original", "nbl": out / "model"}
    static.save_graph(static.build_form(job.checkpoint, job.slots), directories["original"], GRAPH_FILE)
    if job.options.kept_logits == "last":
        keep_last_token(directories["original"])
    rewrite(directories["original"], directories["nbl"], job.plan, maps, dense=True, rows_VD=rows_VD)
    if job.options.precision == "int4":
        for directory in directories.values():
            static.save_int4_twin(directory, directory / INT4)
    return directories


def check_shipped(job: Job, twins: Mapping[str, Path]) -> list[RungResult]:
    """Rung a: the graphs that ship are the proven twins at the job's precision, node for node and bit for bit."""
    from nbl_export.decoders import static
    from nbl_export.engines.onnx_decoder import ALL_LOGITS_FILE, GRAPH_FILE, STATIC_GRAPH_FILE
    from nbl_export.verify_last import check_pruned

    pruned = job.options.kept_logits == "last"
    twin_file, file = (ALL_LOGITS_FILE, ALL_LOGITS_FILE) if pruned else (GRAPH_FILE, STATIC_GRAPH_FILE)
    shipped = {"original": job.run.path / "original", "nbl": job.run.path / "model"}
    results = []
    for subject, directory in shipped.items():
        precision = job.options.precision
        problem = static.difference(twins[subject] / twin_file, directory / file, precision)
        metric, detail = f"the {precision} graph is its fp32 twin, cast", problem or "every node and weight"
        results.append(RungResult("a", subject, metric, float(bool(problem)), 0.5, not problem, detail))
        if pruned:
            results.append(check_pruned(subject, directory))
    return results
