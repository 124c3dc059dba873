"""What OpenVINO's target checks of its files: states, maps, and every other constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.graph.ir.files import constants_of, difference, float_constant, read_ir, stored_matrix
from nbl_export.graph.ir.tail import prune_tail
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.records.decoder import GraphContract
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import PRUNED, SPOKEN, ExpectedGraph, StoredWeights, check_cache, checked, judge_maps

__all__ = ["check", "check_pruned", "check_untouched", "read_maps"]


_OURS = ("nbl.", "/nbl/")
_STEPS = 1.01  # nncf's int4 spans [-8, 8) steps: the mirror image of a group's largest value is one step off


def check(
    directory: Path, contract: GraphContract, wanted: ExpectedGraph, original: Path | None, itemsize: int
) -> list[CheckResult]:
    """See `Target.check`: exactly the right layers have states, of the predicted size.

    Args:
        itemsize: bytes of a cache element as shipped; `contract` is of the float32 arithmetic.
    """
    spec = wanted.spec
    detail = f"states of {len(contract.cache_layers)} of {spec.num_layers} layers, logits {SPOKEN[contract.logits]}"
    same = (contract.cache_layers, contract.logits) == (tuple(wanted.cache_layers), wanted.logits)
    results = [
        checked(wanted.subject, "contract", same, detail),
        check_cache(wanted, contract.cache_bytes_per_token(spec.head_dim) // 4 * itemsize, itemsize),
        judge_maps(wanted.subject, read_maps(directory), wanted.maps),
    ]
    if (directory / ALL_LOGITS_IR).is_file():
        results.append(check_pruned(wanted.subject, directory))
    return results if original is None else [*results, check_untouched(directory, original)]


def read_maps(directory: Path) -> StoredWeights:
    """What a directory's IR holds of mixers."""
    model = read_ir(directory)
    nodes = [n for n in model.get_ops() if n.get_friendly_name().startswith(_OURS)]
    products = {n.get_friendly_name(): n for n in nodes if n.get_type_name() == "MatMul"}
    vectors = {n.get_friendly_name(): n for n in nodes if n.get_type_name() == "Constant" and _is_vector(n)}

    def matrix(product: str) -> tuple[np.ndarray, np.ndarray | float]:
        blocks = stored_matrix(products[product])
        if blocks is None:
            return float_constant(products[product].input_value(1).get_node()), 0.0
        return blocks.values, np.abs(blocks.steps) * (_STEPS if blocks.size > 1 else 0.5) + 1e-30

    return StoredWeights(products, {name: float_constant(node) for name, node in vectors.items()}, matrix)


def _is_vector(constant: Any) -> bool:
    """Whether a constant is a bias or the weight of a norm, and no scale of codes: [1, 1, D]."""
    readers = {port.get_node().get_type_name() for port in constant.output(0).get_target_inputs()}
    return list(constant.get_output_shape(0))[:-1] == [1, 1] and bool(readers & {"Add", "Multiply"})


def check_untouched(directory: Path, original: Path) -> CheckResult:
    """Check that every constant of the NBL graph, except the maps, equals one of the original's byte for byte."""
    known = dict(constants_of(read_ir(original)))
    carried = [(n, v) for n, v in constants_of(read_ir(directory)) if not n.startswith(_OURS)]
    changed = [n for n, v in carried if n not in known or v.tobytes() != known[n].tobytes()]
    detail = f"{changed[0]} differs" if changed else f"{len(carried)} of {len(known)} constants carried over"
    return checked("nbl", "weights untouched", not changed, detail)


def check_pruned(subject: str, directory: Path) -> CheckResult:
    """Check that the graph that ships is the directory's graph with all logits, pruned."""
    expected = read_ir(directory, ALL_LOGITS_IR)
    prune_tail(expected)
    problem = difference(read_ir(directory, IR_FILE), expected)
    return checked(subject, PRUNED, not problem, problem or "every node and constant")
