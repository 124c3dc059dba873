"""Turns an IR and a plan into the NBL IR: the passes of `rewrite`, by the same names, on an OpenVINO model.

`bypass_attention` ─ `drop_states` ─ `tabulate_tokens` ─ `compress` (maps alone) ─ save ─ `prune_tail`

A pass refuses what it does not understand, with layer and reason.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE, IR_WEIGHTS
from nbl_export.mixers import layers_below
from nbl_export.mixers.base import Mixer
from nbl_export.records.plan import Plan
from nbl_export.targets.openvino.ir.anatomy import Dataflow, states_of
from nbl_export.targets.openvino.ir.files import group_of, precision_of, read_ir, save_ir, share_constants
from nbl_export.targets.openvino.ir.matrices import stored_matrices
from nbl_export.targets.openvino.rewrite.compress import compress
from nbl_export.targets.openvino.rewrite.passes import bypass_attention, drop_states, prune_tail, tabulate_tokens

__all__ = ["keep_last_token_ir", "rewrite_ir", "rewrite_ir_model"]

_GRAPHS = (IR_FILE, ALL_LOGITS_IR, IR_WEIGHTS)


def rewrite_ir_model(model: Any, plan: Plan, maps: Mapping[int, Mixer], rows_VD: np.ndarray | None = None) -> None:
    """Rewrite a model in place, with float maps; the empty plan changes nothing.

    Args:
        rows_VD: input of the first kept layer for each token (`token_rows`), looked up instead of computed.

    Raises:
        RefusalError: the model is not understood, or lacks layers of the plan.
    """
    if not plan.replaced:
        return
    before = states_of(model)
    missing = set(plan.replaced) - set(before)
    if missing:
        raise RefusalError(min(missing), f"the IR has states for layers {list(before)} only")
    bypass_attention(model, Dataflow(model), {layer: maps[layer] for layer in plan.replaced}, plan.tap)
    drop_states(model, plan.replaced)
    if rows_VD is not None and layers_below(maps):
        tabulate_tokens(model, rows_VD)
    after = list(states_of(model))
    if after != [layer for layer in before if layer not in plan.replaced]:
        raise RefusalError(None, f"states of layers {after} remain after replacing {list(plan.replaced)}")


def rewrite_ir(
    source: Path, out: Path, plan: Plan, maps: Mapping[int, Mixer], rows_VD: np.ndarray | None = None
) -> None:
    """Write the NBL version of an IR directory to `out`, which must not exist.

    Kept constants stay byte for byte, also those in codes. An empty plan copies the directory. A source with last-token
    logits has the graph with all logits beside it; so has the output.

    Raises:
        RefusalError: the IR is not understood.
    """
    last_only = (source / ALL_LOGITS_IR).is_file()
    out.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file() and (file.name not in _GRAPHS or not plan.replaced):
            shutil.copyfile(file, out / file.name)
    if not plan.replaced:
        return
    model = read_ir(source, ALL_LOGITS_IR if last_only else IR_FILE)
    precision, group = precision_of(model), group_of(model)
    rewrite_ir_model(model, plan, maps, rows_VD)
    model = compress(model, precision, group=group, only_new=True)
    _refuse_float_maps(model, precision)
    save_ir(model, out, precision, group)
    if last_only:
        keep_last_token_ir(out)


def _refuse_float_maps(model: Any, precision: str) -> None:
    """Refuse a model in codes whose maps are floats: they would read more memory than the attention they replace."""
    if precision == "fp32":
        return
    coded = {matrix.name for matrix in stored_matrices(model)}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() == "MatMul" and name.startswith("/nbl/") and name not in coded:
            raise RefusalError(None, f"the product {name} was left in float32 by the compression to {precision}")


def keep_last_token_ir(directory: Path) -> None:
    """Rename the graph to openvino_all_logits.xml, and write the pruned graph in its place. Both read one file.

    Raises:
        RefusalError: the tail of this graph cannot be pruned; no file has changed.
    """
    model = read_ir(directory)
    precision, group = precision_of(model), group_of(model)
    try:
        prune_tail(model)
    except RefusalError as error:
        raise RefusalError(
            error.layer, f"{error.reason} (nodes behind the last attention cannot be pruned; use --logits all)"
        ) from error
    with tempfile.TemporaryDirectory(dir=directory, prefix=".tmp-") as scratch:
        pruned = Path(scratch)
        save_ir(model, pruned, precision, group)
        every = share_constants(directory / IR_FILE, directory / IR_WEIGHTS, (pruned / IR_FILE, pruned / IR_WEIGHTS))
        (pruned / ALL_LOGITS_IR).write_text(every, encoding="utf-8")
        for name in _GRAPHS:
            os.replace(pruned / name, directory / name)
