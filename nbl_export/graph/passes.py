"""Runs graph passes in order."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from nbl_export.errors import RefusalError

__all__ = ["run_passes"]


def run_passes(passes: Sequence[ir.passes.PassBase], model: ir.Model) -> None:
    """Run passes in order.

    Raises:
        RefusalError: a pass refuses the graph; the error is the pass's own.
    """
    try:
        ir.passes.Sequential(*passes)(model)
    except ir.passes.PassError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RefusalError):
            cause = cause.__cause__
        raise cause or error from None
