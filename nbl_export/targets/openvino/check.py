"""What OpenVINO's target checks of its files: states, maps, and every other constant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import RefusalError
from nbl_export.graph.ir.files import constants_of, difference, float_constant, read_ir, stored_matrix
from nbl_export.graph.ir.paged import PagedIr
from nbl_export.graph.ir.session import IrDecoder
from nbl_export.graph.ir.tail import prune_tail
from nbl_export.graph.names import ALL_LOGITS_IR, IR_FILE
from nbl_export.records.decoder import GraphContract
from nbl_export.records.results import CheckResult
from nbl_export.targets.checks import (
    PRUNED,
    SPOKEN,
    ExpectedGraph,
    StoredWeights,
    apart,
    check_cache,
    checked,
    judge_maps,
)

__all__ = ["check", "check_pruned", "check_untouched", "read_maps"]


_OURS = ("nbl.", "/nbl/")
_PAGED = 1e-4  # as of float32 in the ladder
_STEPS = ((300, 1), (150, 280))  # tokens of each step of two sequences; more than the usual recent tokens
_CODES = 1.01  # nncf's int4 spans [-8, 8) steps: the mirror image of a group's largest value is one step off


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
    every = ALL_LOGITS_IR if (directory / ALL_LOGITS_IR).is_file() else IR_FILE
    if every == ALL_LOGITS_IR:
        results.append(check_pruned(wanted.subject, directory))
    results += check_paged(wanted.subject, directory, every)
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
        return blocks.values, np.abs(blocks.steps) * (_CODES if blocks.size > 1 else 0.5) + 1e-30

    return StoredWeights(products, {name: float_constant(node) for name, node in vectors.items()}, matrix)


def _is_vector(constant: Any) -> bool:
    """Whether a constant is a bias or the weight of a norm, and no scale of codes: [1, 1, D]."""
    readers = {port.get_node().get_type_name() for port in constant.output(0).get_target_inputs()}
    return list(constant.get_output_shape(0))[:-1] == [1, 1] and bool(readers & {"Add", "Multiply"})


def check_paged(subject: str, directory: Path, file: str) -> list[CheckResult]:
    """Compare steps of two sequences in the paged back end with each sequence alone in the stateful one, in float32.

    The steps are two prompts, then a decode token beside a further part of the other text. An IR without a paged form
    has no result.
    """
    try:
        paged = PagedIr(directory, file, exact=True)
    except RefusalError:
        return []
    alone = IrDecoder(directory, file, exact=True)
    rng = np.random.default_rng(0)
    texts = [[rng.integers(0, paged.vocab_size, (1, n)) for n in lengths] for lengths in _STEPS]
    paged.begin(max(map(sum, _STEPS)), len(texts))
    found = [paged.step({k: text[turn][0] for k, text in enumerate(texts)}) for turn in range(len(_STEPS[0]))]
    worst = 0.0
    for k, text in enumerate(texts):
        alone.begin(1)
        for turn, ids in enumerate(text):
            right = alone.step(ids)[0]
            before = sum(other[turn].shape[1] for other in texts[:k])
            worst = float(np.maximum(worst, apart(right, found[turn][before : before + len(right)])))
    alone.close()
    paged.close()
    passed = bool(worst <= _PAGED)  # NaN is no number below it
    return [CheckResult("structure", subject, "paged back end, relative rms logit difference", worst, _PAGED, passed)]


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
