"""What the ladder asks of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.graph.names import ALL_LOGITS_FILE, GRAPH_FILE
from nbl_export.records.decoder import ITEMSIZE
from nbl_export.records.results import RungResult
from nbl_export.targets.onnx import check as onnx_files
from nbl_export.verify import last_token
from nbl_export.verify.coded import Coded, coded_graphs
from nbl_export.verify.forms.form import Material, measured_cache
from nbl_export.verify.setting import Setting

__all__ = ["OnnxForm"]


class OnnxForm:
    """Checks of directories with ONNX graphs."""

    def coded(
        self, setting: Setting, directories: Mapping[str, Path], results: list[RungResult], scratch: Path
    ) -> dict[str, Coded]:
        """See `coded.coded_graphs`."""
        return coded_graphs(setting, directories, results, scratch)

    def check(self, subject: str, directory: Path, decoder: Any, material: Material) -> list[RungResult]:
        """Rungs a and f."""
        setting = material.setting
        cache = next(a for a in decoder.contract.inputs if a.name.startswith("past_key_values."))
        ids, size = _cache_ids(setting, subject), ITEMSIZE[cache.dtype]
        pair = (directory / ALL_LOGITS_FILE).is_file()
        shipped = setting.engine.open_graph(directory, setting.spec.head_dim, GRAPH_FILE) if pair else decoder
        results = onnx_files.check_file(subject, directory, setting.spec, ids, shipped.contract, size, setting.logits)
        ours = ({}, None) if subject == "original" else (material.maps, material.rows_VD)
        results += onnx_files.check_maps(subject, directory, *ours)
        if pair:
            results.append(last_token.check_pruned(subject, directory))
            results += last_token.check_last(subject, decoder, shipped, material.row, material.precision)
        results.append(measured_cache(subject, decoder, setting.spec.head_dim))
        return results

    def check_untouched(self, directories: Mapping[str, Path]) -> list[RungResult]:
        """Check that the NBL graph has the original's weights."""
        return onnx_files.check_untouched(directories["nbl"], directories["original"])


def _cache_ids(setting: Setting, subject: str) -> tuple[int, ...]:
    """Ids of the caches: the layers that keep one, or 0..K-1 if the engine numbers caches without gaps."""
    plan = setting.plan
    kept = plan.kept if subject == "nbl" else tuple(range(plan.num_layers))
    return tuple(range(len(kept))) if setting.engine.capabilities.dense_caches else kept
