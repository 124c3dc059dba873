"""The scores of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbl_export.report import words
from nbl_export.report.blocks import (
    Column,
    Details,
    Figure,
    Figures,
    Paragraph,
    Section,
    Table,
)

__all__ = ["section"]

_NOTE = (
    "How well a linear layer can replace each layer's attention, on the calibration text; smaller is better. "
    "The CCA bound ranks layers and says nothing about the size of an error. "
    "The bound is often far above 1, while the NMSE of a fitted map is at most 1. "
    "The relative error is that of the residual output, the NMSE that of the attention output alone."
)
_FIGURES = Figures((
    Figure("bound", "CCA bound of every layer."),
    Figure("relative_error", "Error of the residual output of every layer, relative to its size."),
))  # fmt: skip


def section(report: Mapping[str, Any]) -> Section:
    """Drawings of the scores, and their table."""
    columns: tuple[Column | str, ...] = ("Layer", "Attention", *Column.numbers("CCA bound", "NMSE", "Relative error"))
    table = Table.of(columns, [
        (str(score["layer"]), "replaced" if score["layer"] in report["replaced_layers"] else "kept",
         *(words.number(score[name]) for name in ("bound", "nmse", "relative_error")))
        for score in report["scores"]
    ])  # fmt: skip
    return Section("Layers", (Paragraph(_NOTE), _FIGURES, Details("Scores of all layers", (table,))))
