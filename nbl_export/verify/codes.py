"""Structure of a graph with int4 or int8 matrices: codes match the model's matrices, kernels multiply by the codes.

checkpoint's matrix ──(within a step of its codes)── codes ──(to float32 accuracy)── matrix that the kernel applies

`products` runs each node by itself, on rows of +1 and -1:

    signs [R, K] ─► the node of the graph, with its codes and attributes ─► [R, N]  ==  signs W'
    token ids    ─► a lookup of the graph                                ─► [R, D]  ==  W[ids]

Signs are exact in eight bits, so a kernel that rounds activations (accuracy_level 4) has nothing to round. A code that
is off by one step shows. All nodes are in one session; weights stay in the graph's own data file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import CorruptError
from nbl_export.graph.session import open_session
from nbl_export.records.quantised import Blocks, Fidelity, StoredMatrix
from nbl_export.records.results import CheckResult

__all__ = [
    "DISTANCE",
    "NEAREST",
    "NEARNESS",
    "PRODUCTS",
    "ROWS",
    "SEARCHED",
    "TWIN",
    "check_nearness",
    "check_products",
    "distance",
    "products",
    "signs",
]

# Metrics of this file's results.
NEARNESS = "steps between a matrix and its codes"
PRODUCTS = "error of quantised products, of the sum of magnitudes"
DISTANCE = "relative rms distance from the model before rounding"
TWIN = "float32 twin"
# Largest error of rounding to nearest, in steps: usually half a step. ONNX Runtime's symmetric quantiser spans [-8, 8)
# steps, so the mirror image of a block's largest number is a whole step off.
NEAREST = 1.01
SEARCHED = 2.0  # for k_quant, which searches scale and zero point and may clip a block's ends: 1.1 observed
# Relative to the sum of a row's magnitudes. Float32 sums differ by 2e-7 (SmolLM2, both precisions, AVX-512). One int4
# code that is a step off in a row of 14,336 shows as 3e-5.
_SUMS = 2e-6
ROWS = 8  # of signs: two columns agree, or are opposite, in all rows once in 128 times
_TOKENS = 2048  # most rows of a table that are looked up
_KINDS = ("MatMulNBits", "GatherBlockQuantized")


def check_nearness(subject: str, found: Sequence[Fidelity], limit: float | None) -> CheckResult:
    """Check that the codes are those of the model's matrices.

    Args:
        limit: `NEAREST` or `SEARCHED` if nbl-export quantised the graph. None only reports the distance of another
            tool's codes: such codes compensate for each other's errors and lie farther away.
    """
    worst = max(found, key=lambda f: f.steps)
    detail = f"{len(found)} matrices; the farthest is {worst.name}, row {worst.row}"
    passed = limit is None or worst.steps <= limit
    return CheckResult("structure", subject, NEARNESS, worst.steps, limit, passed, detail)


def check_products(
    subject: str, matrices: Sequence[StoredMatrix], ran: Iterable[tuple[str, np.ndarray, np.ndarray]]
) -> CheckResult:
    """Check that each node multiplies by, or looks up, the values of its codes.

    Args:
        matrices: the graph's quantised matrices.
        ran: name, input and output of each node (`products`).
    """
    known = {matrix.name: matrix for matrix in matrices}
    worst, name, count = 0.0, "", 0
    for node, given, output in ran:
        error = _error(known[node].lookup, known[node].blocks(), given, output)
        count += 1
        if not error <= worst:  # true for NaN too
            worst, name = error, node
    detail = f"{count} nodes, each by itself" + (f"; the largest is of {name}" if name else "")
    return CheckResult("structure", subject, PRODUCTS, worst, _SUMS, worst <= _SUMS, detail)


def _error(lookup: bool, blocks: Blocks, given: np.ndarray, output: np.ndarray) -> float:
    matrix = blocks.values
    if lookup:
        expected, size = matrix[given[0]], np.abs(matrix[given[0]]).sum(1, keepdims=True)
    else:
        expected, size = given @ matrix.T, np.abs(matrix).sum(1)
    away = np.abs(output.reshape(expected.shape).astype(np.float64) - expected)
    return float((away / np.maximum(size, 1e-30)).max())


def distance(subject: str, got: Sequence[np.ndarray], before: Sequence[np.ndarray]) -> CheckResult:
    """Report the distance of logits from those of the model with unrounded matrices; no limit applies."""
    away = sum(float(np.square(g.astype(np.float64) - b).sum()) for g, b in zip(got, before, strict=True))
    size = sum(float(np.square(b.astype(np.float64)).sum()) for b in before)
    return CheckResult("quantised", subject, DISTANCE, float(np.sqrt(away / size)), None, True, "reported, not gated")


def signs(columns: int) -> np.ndarray:
    """Rows [R, columns] of +1 and -1, the same in every call."""
    random = np.random.default_rng(columns)
    return (2 * random.integers(0, 2, (ROWS, columns)) - 1).astype(np.float32)


def products(graph: Path, threads: int | None = None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, input and output of every MatMulNBits and GatherBlockQuantized of a graph.

    The input is `signs` of the node's width, or token ids.

    Raises:
        CorruptError: ONNX Runtime cannot load or run the nodes.
    """
    import onnx

    proto = onnx.load(str(graph), load_external_data=False)
    nodes = [n for n in proto.graph.node if n.op_type in _KINDS]
    if not nodes:
        return
    probe, feeds, places = _probe(proto, nodes)
    session = open_session(probe.SerializeToString(), threads, folder=graph.parent)
    try:  # one run: ONNX Runtime computes all nodes, whichever outputs are requested
        found = session.run(None, feeds)
    except Exception as error:  # ORT's own exception types
        raise CorruptError(f"ONNX Runtime cannot run the products of {graph}: {error}") from error
    for node, place, output in zip(nodes, places, found, strict=True):
        yield node.name, feeds[place], output


def _probe(proto: Any, nodes: Sequence[Any]) -> tuple[Any, dict[str, np.ndarray], list[str]]:
    """A graph of these nodes side by side, its inputs, and the name of each node's input."""
    import onnx

    tensors = {t.name: t for t in proto.graph.initializer}
    makers = {name: n for n in proto.graph.node for name in n.output}
    body: dict[str, Any] = {}  # first output -> node, in execution order
    places = []

    def add(name: str) -> None:
        """Add the node that makes a stored operand: a Reshape of codes that two nodes share."""
        maker = makers.get(name)
        if maker is not None and maker.output[0] not in body:
            for given in maker.input:
                add(given)
            body[maker.output[0]] = maker

    for node in nodes:
        mine = onnx.NodeProto()
        mine.CopyFrom(node)
        index = 0 if node.op_type == "MatMulNBits" else 1
        places.append(_input_of(node, tensors))
        mine.input[index] = places[-1]
        for name in node.input[:index] + node.input[index + 1 :]:
            add(name)
        body[node.output[0]] = mine
    feeds = {place: _given(place) for place in places}
    read = {name for node in body.values() for name in node.input}
    kept = [tensor for name, tensor in tensors.items() if name in read]
    kinds = {"i": onnx.TensorProto.INT64, "f": onnx.TensorProto.FLOAT}
    infos = [onnx.helper.make_tensor_value_info(p, kinds[f.dtype.kind], f.shape) for p, f in feeds.items()]
    outputs = [onnx.helper.make_tensor_value_info(n.output[0], onnx.TensorProto.FLOAT, None) for n in nodes]
    made = onnx.helper.make_graph(list(body.values()), "products", infos, outputs, initializer=kept)
    model = onnx.helper.make_model(made, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
    return model, feeds, places


def _input_of(node: Any, tensors: dict[str, Any]) -> str:
    """Name of a node's input: signs of a width, or ids of a table with so many rows."""
    if node.op_type == "MatMulNBits":
        return f"signs.{next(a.i for a in node.attribute if a.name == 'K')}"
    return f"ids.{tensors[node.input[2]].dims[0]}"


def _given(place: str) -> np.ndarray:
    kind, size = place.split(".")
    if kind == "signs":
        return signs(int(size))
    return np.unique(np.linspace(0, int(size) - 1, min(int(size), _TOKENS)).astype(np.int64))[None]
