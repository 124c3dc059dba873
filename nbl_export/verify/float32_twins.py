"""Float32 twins (float32 copies) of shipped graphs: a CPU can verify fp16, bf16 and int4 graphs through them.

    checkpoint ─ static form, float32 ─► original/model.onnx ─ rewrite ─► model/model.onnx      compared with torch
                                                 └─ int4/                        └─ int4/       how coarse int4 is
    finish(twin, precision)  ==  DIR/original/decoder.onnx, DIR/model/decoder.onnx              bit for bit

The twin agrees with torch, and the shipped graph is the twin cast to its precision. Only the cast itself is unproven.
If the logits of the last token ship, twins and shipped graphs are pairs (`rewrite.tail`). The graphs with
all logits are compared with torch and with each other. Each pruned graph is compared with its pair after pruning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nbl_export.mixers.base import Mixer
from nbl_export.records.results import YES_NO, CheckResult
from nbl_export.run_directory import DECODERS
from nbl_export.verify.structure import Setting

__all__ = ["build_twins", "check_shipped"]


def build_twins(checkpoint: Path, setting: Setting, maps: Mapping[int, Mixer], out: Path) -> dict[str, Path]:
    """Write both twins with the shipped logits, as the stages do; an int4 run gets each twin with int4 matrices too."""
    directories = {subject: out / name for subject, name in DECODERS.items()}
    setting.engine.write_twin(checkpoint, directories["original"], setting.cache_length)
    if setting.logits == "last":
        setting.engine.keep_last_token(directories["original"])
    setting.engine.linearize(directories["original"], directories["nbl"], maps, setting.plan.tap)
    if setting.precision == "int4":
        for directory in directories.values():
            setting.engine.write_int4_twin(directory)
    return directories


def check_shipped(setting: Setting, shipped: Mapping[str, Path], twins: Mapping[str, Path]) -> list[CheckResult]:
    """Check structure: each shipped graph is its verified twin cast to its precision, node for node and bit for bit."""
    from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE, STATIC_GRAPH_FILE

    pruned = setting.logits == "last"
    twin_file, file = (ALL_LOGITS_FILE, ALL_LOGITS_FILE) if pruned else (GRAPH_FILE, STATIC_GRAPH_FILE)
    results = []
    for subject, directory in shipped.items():
        precision = setting.precision
        problem = setting.engine.twin_difference(twins[subject] / twin_file, directory / file, precision)
        metric, detail = f"the {precision} graph is its fp32 twin, cast", problem or "every node and weight"
        results.append(CheckResult("structure", subject, metric, float(bool(problem)), YES_NO, not problem, detail))
        if pruned:
            results.append(setting.engine.check_pruned(subject, directory))
    return results
