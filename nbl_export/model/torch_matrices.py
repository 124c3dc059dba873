"""Gives a torch model the exact matrices of a quantised graph, recognised by their values.

    graph: matrix in codes [N, K] ─► the model's most similar rows ─► these rows take the dequantised values
                                     └► largest distance, in steps of the codes

A matrix is recognised by its values alone, and the graph alone decides what is done with the matrix. So a matrix in the
wrong place shows in the logits, and exporters' names do not matter. One graph matrix may be several matrices of the
model (q, k and v), or a part of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.errors import CorruptError
from nbl_export.mixers.base import Mixer
from nbl_export.mixers.modules import MixerModule
from nbl_export.records.quantised import Fidelity, StoredMatrix

__all__ = ["give", "give_floats", "look_up", "nearest_maps"]

_LIKE = 0.7  # least cosine of rows that differ by rounding only; rows of different matrices have about 0
_SAMPLED = 16  # rows by which a matrix is recognised


class _Rows:
    """Rows of a module's weight [N, K]; `taken` marks rows that have received a matrix."""

    def __init__(self, name: str, weight: torch.Tensor) -> None:
        self.name, self.weight = name, weight
        self.taken = np.zeros(len(weight), bool)

    def runs(self) -> list[tuple[int, int]]:
        """First row and end of each free run."""
        edges = np.flatnonzero(np.diff(np.concatenate([[True], self.taken, [True]]).astype(np.int8)))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def give(model: Any, matrices: Iterable[StoredMatrix]) -> list[Fidelity]:
    """Put matrices into the model, in place; a head that is tied to the embedding becomes a separate matrix.

    Raises:
        CorruptError: a matrix matches none of the model's, or the graph has a part of a model's matrix only.
    """
    _untie(model)
    found = []
    kinds = {True: _modules(model, nn.Embedding), False: _modules(model, nn.Linear)}
    for stored in matrices:
        found.append(_give(kinds[stored.lookup], stored))
    torn = [rows.name for kind in kinds.values() for rows in kind if 0 < rows.taken.sum() < len(rows.taken)]
    if torn:
        raise CorruptError(f"the graph has only a part of {torn[0]} in codes")
    return found


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _modules(model: Any, kind: type[nn.Embedding] | type[nn.Linear]) -> list[_Rows]:
    return [_Rows(name, m.weight.detach()) for name, m in model.named_modules() if isinstance(m, kind)]


def _give(candidates: Sequence[_Rows], stored: StoredMatrix) -> Fidelity:
    blocks = stored.blocks()
    matrix = torch.from_numpy(blocks.values)
    if stored.lookup and 0 < matrix.shape[1] - (width := candidates[0].weight.shape[1]) < blocks.size:
        matrix = matrix[:, :width]  # a table has whole blocks, and the graph cuts the rows that it looks up
    names, place, worst, at = [], 0, 0.0, 0
    while place < len(matrix):
        rows, first, count = _nearest(candidates, matrix, place, stored.name)
        here, there = slice(place, place + count), slice(first, first + count)
        steps = torch.from_numpy(blocks.scales[here]).abs().clamp(min=1e-30)  # scale 0: any other value is far
        ratio = _largest_of_blocks((matrix[here] - rows.weight[there].float()).abs(), blocks.size) / steps
        if float(ratio.max()) > worst:
            worst, at = float(ratio.max()), place + int(ratio.amax(1).argmax())
        with torch.no_grad():
            rows.weight[there].copy_(matrix[here])
        rows.taken[there] = True
        names.append(rows.name)
        place += count
    return Fidelity(stored.name, tuple(names), worst, at)


def _largest_of_blocks(away_NK: torch.Tensor, size: int) -> torch.Tensor:
    """Largest value of each block of a row: [N, blocks]."""
    padded = nn.functional.pad(away_NK, (0, -away_NK.shape[1] % size))
    return padded.view(len(padded), -1, size).amax(2)


def _nearest(candidates: Sequence[_Rows], matrix: torch.Tensor, place: int, name: str) -> tuple[_Rows, int, int]:
    """The free rows most like a matrix from row `place` on: their module, the first row, and how many rows."""
    best: tuple[float, _Rows, int, int] | None = None
    for rows in candidates:
        if rows.weight.shape[1] != matrix.shape[1]:
            continue
        for first, end in rows.runs():
            count = min(end - first, len(matrix) - place)
            like = _likeness(rows.weight[first : first + count], matrix[place : place + count])
            if best is None or like > best[0]:
                best = (like, rows, first, count)
    if best is None or best[0] < _LIKE:
        raise CorruptError(f"{name} of the graph, from row {place} on, matches no matrix of the model")
    return best[1:]


def _likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """Median cosine of a sample of rows."""
    chosen = torch.linspace(0, len(one) - 1, min(len(one), _SAMPLED)).round().long()
    return float(nn.functional.cosine_similarity(one[chosen].float(), other[chosen], dim=1).median())


def give_floats(model: Any, weights: Sequence[Path]) -> None:
    """Put a quantised checkpoint's floating-point tensors (norms, biases) into the model, in place."""
    from safetensors.torch import load_file

    ours = model.state_dict()
    _untie(model)
    with torch.no_grad():
        for name, tensor in (item for file in weights for item in load_file(str(file)).items()):
            if tensor.is_floating_point() and name in ours and ours[name].shape == tensor.shape:
                ours[name].copy_(tensor)


def nearest_maps(maps: Mapping[int, Mixer], matrices: Sequence[StoredMatrix]) -> dict[int, Mixer]:
    """Fitted mixers with a graph's matrices; a matrix that the graph lacks stays as fitted.

    Raises:
        CorruptError: a matrix of the graph matches none of these mixers.
    """
    numbers = {(i, part): torch.from_numpy(m.copy()) for i, a in maps.items() for part, m in a.matrices().items()}
    free = [_Rows(f"{i}.{part}", tensor) for (i, part), tensor in numbers.items()]
    for stored in matrices:
        _give(free, stored)
    return {i: a.with_matrices({part: numbers[i, part].numpy() for part in a.matrices()}) for i, a in maps.items()}


def look_up(model: Any, table_VD: np.ndarray, first: int) -> None:
    """Make the rows of a table [V, D] the input of layer `first`, instead of embedding and layers below `first`."""
    from nbl_export.model.linearize import architecture_of

    decoder = model.get_decoder()
    _untie(model)
    decoder.embed_tokens = nn.Embedding(*table_VD.shape, _weight=torch.from_numpy(table_VD), _freeze=True)
    name = architecture_of(decoder.config).entry_multiplier
    if name is not None:
        setattr(decoder, name, 1.0)
    for index in range(first):
        decoder.layers[index] = _Counted(index)


class _Counted(nn.Module):
    """Replaces a layer whose output is looked up; the cache still counts the layer's tokens."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.counter = MixerModule()
        self.counter.layer_idx = index

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **kwargs: Any) -> torch.Tensor:
        self.counter.remember(hidden_states, kwargs.get("cache", kwargs.get("past_key_values")))
        return hidden_states
