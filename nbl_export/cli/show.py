"""Shows a result on stdout, and progress on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from nbl_export.trust.terminal import Console

if TYPE_CHECKING:
    from nbl_export.report.table import Shown, Table
    from nbl_export.run.progress import Ui

__all__ = ["show", "ui"]


def show(value: Any, table: Table | Shown, as_json: bool) -> None:
    """Write a result to stdout, as JSON or as tables."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=1) + "\n")
    else:
        shown = table if isinstance(table, tuple) else (table,)
        Console(width=None if sys.stdout.isatty() else 110).print(*shown, sep="\n")


def ui(quiet: bool = False) -> Ui:
    """The progress display of a run."""
    from nbl_export.run.progress import Ui

    return Ui(quiet=quiet)
