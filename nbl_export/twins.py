"""The float32 twins of graphs that ship: what a CPU can prove of fp16, bf16 and int4 graphs, to the last digit.

    checkpoint ─ static form, float32 ─► original/model.onnx ─ rewrite ─► model/model.onnx      compared with torch
                                                 ├─ last.onnx                    ├─ last.onnx   greedy text
                                                 └─ int4/                        └─ int4/       how coarse int4 is
    finish(twin, precision)  ==  DIR/original/decoder.onnx, DIR/model/decoder.onnx              bit for bit

A twin that agrees with torch, and a shipped graph that is that twin cast, leave nothing unproven but the cast itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nbl_export.job import Job
from nbl_export.records import AffineMap, RungResult

__all__ = ["INT4", "build_twins", "check_shipped"]

INT4 = "int4"  # directory of a twin with int4 matrices around float32 arithmetic


def build_twins(job: Job, maps: Mapping[int, AffineMap], out: Path) -> dict[str, Path]:
    """Write both twins with all logits, beside each its graph with the last token's, and `INT4` for an int4 job."""
    from nbl_export.decoders import static
    from nbl_export.engines.tensorrt import LAST_TWIN_FILE, TWIN_FILE
    from nbl_export.rewrite import make_dense, rewrite

    directories = {"original": out / "original", "nbl": out / "model"}
    static.save_graph(static.build_form(job.checkpoint, job.slots), directories["original"], TWIN_FILE)
    rewrite(directories["original"], directories["nbl"], job.plan, maps)
    make_dense(directories["nbl"] / TWIN_FILE)
    for directory in directories.values():
        static.save_last_twin(directory / TWIN_FILE, directory / LAST_TWIN_FILE)
        if job.options.precision == "int4":
            static.save_int4_twin(directory / TWIN_FILE, directory / INT4)
    return directories


def check_shipped(job: Job, twins: Mapping[str, Path]) -> list[RungResult]:
    """Rung a: the graphs that ship are the proven twins at the job's precision, node for node and bit for bit."""
    from nbl_export.decoders import static
    from nbl_export.engines.tensorrt import TWIN_FILE

    shipped = {"original": job.run.path / "original", "nbl": job.run.path / "model"}
    results = []
    for subject, directory in shipped.items():
        options = job.options
        problem = static.difference(twins[subject] / TWIN_FILE, directory, options.precision, options.kept_logits)
        metric, detail = f"the {options.precision} graph is its fp32 twin, cast", problem or "every node and weight"
        results.append(RungResult("a", subject, metric, float(bool(problem)), 0.5, not problem, detail))
    return results
