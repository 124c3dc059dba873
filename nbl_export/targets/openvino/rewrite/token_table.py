"""Replaces the embedding and leading linearized layers of an IR by one table with a row for each token.

    before   input_ids -- embedding -- layers 0..k-1 (linearized) -- x of layer k
    after    input_ids -- Gather(table [V, D]) --------------------- x of layer k

Without attention below layer k, its input depends on one token alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.targets.openvino.ir.anatomy import Dataflow

__all__ = ["TABLE", "tabulate_tokens"]

TABLE = "nbl.token_table"


def tabulate_tokens(model: Any, rows_VD: np.ndarray) -> None:
    """Feed the first layer that keeps its states from a table, in place; run after `drop_states`.

    Args:
        rows_VD: input of that layer for each token.

    Raises:
        RefusalError: the model has no input input_ids.
    """
    from openvino import opset13 as ops

    flow = Dataflow(model)
    first = min(flow.states)
    x = flow.block(first).residual
    ids = next((p for p in model.inputs if "input_ids" in p.get_names()), None)
    if ids is None:
        raise RefusalError(None, "it has no input input_ids, which a table for each token needs")
    readers = x.get_target_inputs()
    table = ops.constant(np.ascontiguousarray(rows_VD, np.float32), name=TABLE)
    axis = ops.constant(0, dtype="int64", name=f"{TABLE}/axis")
    found = ops.gather(table, ids, axis, name=f"/nbl/layers.0-{first - 1}/Gather")
    for reader in readers:
        reader.replace_source_output(found.output(0))
    model.validate_nodes_and_infer_types()
