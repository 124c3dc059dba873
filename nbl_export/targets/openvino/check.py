"""Rung a of the ladder for an IR: states as predicted, maps as fitted, every other constant unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.records.decoder import DecoderSpec, GraphContract
from nbl_export.records.plan import AffineMap, layers_below
from nbl_export.records.results import RungResult
from nbl_export.targets.openvino.ir.difference import difference
from nbl_export.targets.openvino.ir.files import read_ir
from nbl_export.targets.openvino.ir.matrices import constant_of, constants_of, stored_matrices
from nbl_export.targets.openvino.rewrite.bypass import product_name
from nbl_export.targets.openvino.rewrite.tail import prune_tail
from nbl_export.targets.openvino.rewrite.token_table import TABLE

__all__ = ["check_ir_maps", "check_ir_pruned", "check_ir_states", "check_ir_untouched"]

_OURS = ("nbl.", "/nbl/")
_SPOKEN = {"last": "of the last token", "all": "of all tokens"}
_STEPS = 1.01  # nncf's int4 spans [-8, 8) steps: the mirror image of a group's largest value is one step off


def check_ir_states(
    subject: str, spec: DecoderSpec, kept: Sequence[int], contract: GraphContract, itemsize: int, logits: str
) -> list[RungResult]:
    """Check that exactly the kept layers have states, of the predicted size, and that the logits are as planned."""
    detail = f"states of {len(contract.cache_layers)} of {spec.num_layers} layers, logits {_SPOKEN[contract.logits]}"
    same = contract.cache_layers == tuple(kept) and contract.logits == logits
    predicted = spec.cache_bytes_per_token(len(kept), itemsize)
    stated = contract.cache_bytes_per_token(spec.head_dim) // 4 * itemsize
    sizes = f"{stated} bytes a token, {predicted} predicted"
    return [
        _verdict(subject, "contract", same, detail),
        _verdict(subject, "cache bytes per token", stated == predicted, sizes),
    ]


def check_ir_maps(
    subject: str, directory: Path, maps: Mapping[int, AffineMap], rows_VD: np.ndarray | None = None
) -> RungResult:
    """Check that the IR's maps are the fitted maps: exact if floating point, within a step if in codes.

    Args:
        rows_VD: output of the layers below the first kept layer for each token, if the graph looks it up in a table.
    """
    model = read_ir(directory)
    ours = [name for name, _ in constants_of(model) if name.startswith(_OURS)]
    if not maps:
        return _verdict(subject, "maps in the graph", not ours, "none planned")
    stored = {matrix.name: matrix for matrix in stored_matrices(model) if matrix.name.startswith("/nbl/")}
    first = len(layers_below(maps)) if rows_VD is not None else 0
    problems = [] if rows_VD is None else [_table_problem(model, stored, first, rows_VD)]
    shown = {i: affine for i, affine in maps.items() if rows_VD is None or i > first}
    problems += [_map_problem(model, stored, layer, affine) for layer, affine in sorted(shown.items())]
    products = {product_name(i, part) for i, affine in shown.items() for part in affine.matrices}
    surplus = sorted(n for n in _products(model) if n not in products)
    detail = f"{len(maps)} map{'' if len(maps) == 1 else 's'} as fitted"
    detail += f", a table for the first {first}" if first else ""
    worst = next(filter(None, problems), f"{surplus[0]} is not of the plan" if surplus else "")
    return _verdict(subject, "maps in the graph", not worst, worst or detail)


def _products(model: Any) -> list[str]:
    nodes = (n for n in model.get_ops() if n.get_type_name() == "MatMul")
    return [name for n in nodes if (name := n.get_friendly_name()).startswith("/nbl/")]


def _map_problem(model: Any, stored: Mapping[str, Any], layer: int, affine: AffineMap) -> str:
    """How a layer's map in the graph differs from the fitted map; "" if it does not differ."""
    bias = constant_of(model, f"nbl.layers.{layer}.bias")
    if (bias is not None) != affine.has_bias or (bias is not None and not np.array_equal(bias.ravel(), affine.bias)):
        return f"layer {layer}'s bias is not the fitted one"
    for part, matrix in affine.matrices.items():
        name = product_name(layer, part)
        if name not in _products(model):
            return f"layer {layer} has no product with its {part}"
        found, allowed = _matrix(model, stored.get(name), f"nbl.layers.{layer}.{part}")
        if found is None or found.shape != matrix.shape or (np.abs(found - matrix) > allowed).any():
            return f"layer {layer}'s {part} is not the fitted one"
    return ""


def _table_problem(model: Any, stored: Mapping[str, Any], first: int, rows_VD: np.ndarray) -> str:
    """How the token table differs from the output of the layers below `first`; "" if it does not differ."""
    found, allowed = _matrix(model, stored.get(f"/nbl/layers.0-{first - 1}/Gather"), TABLE)
    if found is None or found.shape != rows_VD.shape:
        return f"there is no table of the tokens below layer {first}"
    noise = 1e-5 * np.abs(rows_VD).max()  # allows for differences between processors
    off = (np.abs(found - rows_VD) > allowed + noise).any(1)
    return f"token {int(off.argmax())} of the table is not the output of its layers" if off.any() else ""


def _matrix(model: Any, stored: Any | None, name: str) -> tuple[np.ndarray | None, np.ndarray | float]:
    """A matrix of the graph, and the allowed error of each element."""
    if stored is None:
        return constant_of(model, name), 0.0
    blocks = stored.blocks()
    return blocks.matrix, np.abs(blocks.steps) * (_STEPS if blocks.size > 1 else 0.5) + 1e-30


def check_ir_untouched(directory: Path, original: Path) -> RungResult:
    """Check that every constant of the NBL graph, except the maps, equals one of the original's byte for byte."""
    known = dict(constants_of(read_ir(original)))
    carried = [(n, v) for n, v in constants_of(read_ir(directory)) if not n.startswith(_OURS)]
    changed = [n for n, v in carried if n not in known or v.tobytes() != known[n].tobytes()]
    detail = f"{changed[0]} differs" if changed else f"{len(carried)} of {len(known)} constants carried over"
    return _verdict("nbl", "weights untouched", not changed, detail)


def check_ir_pruned(subject: str, directory: Path) -> RungResult:
    """Check that the graph that ships is the directory's graph with all logits, pruned."""
    expected = read_ir(directory, ALL_LOGITS_IR)
    prune_tail(expected)
    problem = difference(read_ir(directory, IR_FILE), expected)
    metric = "what ships is the graph with all logits, pruned"
    return _verdict(subject, metric, not problem, problem or "every node and constant")


def _verdict(subject: str, metric: str, passed: bool, detail: str) -> RungResult:
    return RungResult("a", subject, metric, 0.0 if passed else 1.0, 0.5, passed, detail)
