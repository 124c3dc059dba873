"""What the ladder asks of an IR. The IR in float32 arithmetic takes the place of a float32 twin.

shipped IR ─┬─ float32 arithmetic, same constants: compared with the model that has its matrices    rungs a, b, c, f
            └─ the arithmetic that ships: compared with the same model                              rungs d, g
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.records.results import RungResult
from nbl_export.targets.openvino import check as ir_files
from nbl_export.targets.openvino.decoder import IrDecoder
from nbl_export.targets.openvino.ir.files import read_ir
from nbl_export.targets.openvino.ir.matrices import stored_matrices
from nbl_export.verify import last_token
from nbl_export.verify.coded import Coded
from nbl_export.verify.forms.form import Material, measured_cache
from nbl_export.verify.setting import Setting

__all__ = ["IrForm"]


class IrForm:
    """Checks of IR directories."""

    def check(self, subject: str, directory: Path, decoder: Any, material: Material) -> list[RungResult]:
        """Rungs a and f."""
        setting = material.setting
        kept = setting.plan.kept if subject == "nbl" else tuple(range(setting.plan.num_layers))
        itemsize = setting.engine.capabilities.cache_itemsize(setting.precision)
        exact = IrDecoder(directory, _most_logits(directory), exact=True)
        pair = (directory / ALL_LOGITS_IR).is_file()
        shipped = IrDecoder(directory, IR_FILE, exact=True) if pair else exact
        contract = shipped.contract
        results = ir_files.check_ir_states(subject, setting.spec, kept, contract, itemsize, setting.logits)
        ours = ({}, None) if subject == "original" else (material.maps, material.rows_VD)
        results.append(ir_files.check_ir_maps(subject, directory, *ours))
        if pair:
            results.append(ir_files.check_ir_pruned(subject, directory))
            results += last_token.check_last(subject, exact, shipped, material.row, "fp32")
        results.append(measured_cache(subject, exact, setting.spec.head_dim))
        return results

    def check_untouched(self, directories: Mapping[str, Path]) -> list[RungResult]:
        """Check that the NBL graph has the original's constants."""
        return [ir_files.check_ir_untouched(directories["nbl"], directories["original"])]

    def coded(
        self, setting: Setting, directories: Mapping[str, Path], results: list[RungResult], scratch: Path
    ) -> dict[str, Coded]:
        """The graphs with matrices in codes or 16 bits, by subject."""
        found = {}
        for subject, directory in directories.items():
            stored = stored_matrices(read_ir(directory))
            if stored:
                file = _most_logits(directory)
                opened = functools.partial(IrDecoder, directory, file, exact=True)
                found[subject] = Coded(directory / file, opened, stored, None, ships=True)
        return found


def _most_logits(directory: Path) -> str:
    return ALL_LOGITS_IR if (directory / ALL_LOGITS_IR).is_file() else IR_FILE
