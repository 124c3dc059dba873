"""The torch model's reference: logits and greedy text that graphs are compared with, as numpy arrays.

For a quantised graph the model gets the graph's exact matrices, recognised by their values:

    graph: matrix in codes [N, K] ─► the model's most similar rows ─► these rows take the dequantised values
                                     └► largest distance, in steps of the codes

A matrix is recognised by its values alone, and the graph alone decides what is done with the matrix. So a matrix in the
wrong place shows in the logits, and exporters' names do not matter. One graph matrix may be several matrices of the
model (q, k and v), or a part of one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nbl_export.errors import CorruptError
from nbl_export.mixers.base import Mixer
from nbl_export.model.linearize import linearize, replaced
from nbl_export.records.quantised import Blocks, Fidelity, StoredMatrix
from nbl_export.verify.ladder import Probe, Reference, shown_positions

__all__ = [
    "NOISE_DRAWS",
    "NOISE_DRAWS_LONG",
    "Codes",
    "factors",
    "give",
    "give_floats",
    "give_known",
    "make_reference",
    "nearest_maps",
    "noise_with_codes",
    "noise_with_maps",
    "references",
    "references_with_codes",
    "row_logits",
    "with_noise",
]

NOISE_DRAWS = 4
NOISE_DRAWS_LONG = 1


_LIKE = 0.7  # least cosine of rows that differ by rounding only; rows of different matrices have about 0
_SAMPLED = 16  # rows by which a matrix is recognised
_ROWS = 8192  # of a matrix that are unpacked at once


def references(
    model: Any, maps: Mapping[int, Mixer], tap: str, probe: Probe, known: Reference | None = None
) -> dict[str, Reference]:
    """References of the original model and of the model with maps. The model is unchanged afterwards.

    Args:
        known: the reference of the original model, if it is known; the original model then does not run.
    """
    original = make_reference(model, probe) if known is None else known
    with replaced(model, maps, tap):
        return {"original": original, "nbl": make_reference(model, probe)}


def references_with_codes(
    model: Any, maps: Mapping[int, Mixer], tap: str, probe: Probe, codes: Codes, known: Reference | None = None
) -> tuple[dict[str, Reference], list[Fidelity]]:
    """Like `references`, with the matrices of quantised graphs; also their distances from the model's matrices.

    This changes the model.

    Raises:
        CorruptError: a matrix does not match any matrix of the model.
    """
    fidelity = _give_original(model, codes)
    original = make_reference(model, probe) if known is None else known
    _give_maps(model, maps, tap, codes)
    return {"original": original, "nbl": make_reference(model, probe)}, fidelity


@dataclass(frozen=True)
class Codes:
    """Matrices of the quantised graphs, by subject. The NBL graph adds maps.

    floats: safetensors of the quantised checkpoint that the codes come from; its norms belong to the codes.
    """

    stored: Mapping[str, Sequence[StoredMatrix]]
    floats: Sequence[Path] = ()

    @property
    def maps(self) -> list[StoredMatrix]:
        """The matrices of maps."""
        return [matrix for matrix in self.stored["nbl"] if matrix.name.startswith("/nbl/")]


def _give_original(model: Any, codes: Codes) -> list[Fidelity]:
    give_floats(model, codes.floats)
    return give(model, codes.stored["original"])


def _give_maps(model: Any, maps: Mapping[int, Mixer], tap: str, codes: Codes) -> None:
    linearize(model, nearest_maps(maps, codes.maps), tap)


def make_reference(model: Any, probe: Probe) -> Reference:
    """Run the torch model: one causal forward a row (no cache, no padding), and greedy text with its cache.

    The noise is not measured.
    """
    with torch.inference_mode():
        logits = tuple(_logits(model, row) for row in probe.rows)
        long = _logits(model, probe.long, _shown(probe)) if probe.long else None
        texts, margins = _greedy(model, probe.prompts, probe.new_tokens)
    return Reference.without_noise(logits, texts, margins, long)


def noise_with_maps(
    model: Any, maps: Mapping[int, Mixer], tap: str, probe: Probe, subject: str, reference: Reference
) -> Reference:
    """A reference of `references` with its noise. The model is unchanged afterwards."""
    with replaced(model, maps if subject == "nbl" else {}, tap):
        return with_noise(model, probe, reference)


def noise_with_codes(
    model: Any, maps: Mapping[int, Mixer], tap: str, probe: Probe, codes: Codes, subject: str, reference: Reference
) -> Reference:
    """A reference of `references_with_codes` with its noise. This changes the model."""
    _give_original(model, codes)
    if subject == "nbl":
        _give_maps(model, maps, tap, codes)
    return with_noise(model, probe, reference)


def with_noise(model: Any, probe: Probe, reference: Reference) -> Reference:
    """The reference of this model, with its noise."""
    with torch.inference_mode():
        rows = zip(probe.rows, reference.logits, strict=True)
        noise = tuple(_noise(model, row, clean, NOISE_DRAWS) for row, clean in rows)
        long = None
        if reference.long is not None:
            long = _noise(model, probe.long, reference.long, NOISE_DRAWS_LONG, _shown(probe))
    return dataclasses.replace(reference, noise=noise, long_noise=long, noisy=True)


def _shown(probe: Probe) -> torch.Tensor:
    return torch.from_numpy(shown_positions(len(probe.long)))


def row_logits(model: Any, row: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a row of tokens, without a cache."""
    with torch.inference_mode():
        return _logits(model, row, 0)


def _logits(model: Any, row: Sequence[int], kept: torch.Tensor | int = 0) -> np.ndarray:
    """kept: positions whose logits are computed; 0 means all positions."""
    out = model(torch.tensor([list(row)], device=model.device), use_cache=False, logits_to_keep=kept)
    found: np.ndarray = out.logits[0].float().cpu().numpy()
    return found


def _noise(model: Any, row: Sequence[int], clean: np.ndarray, draws: int, kept: torch.Tensor | int = 0) -> np.ndarray:
    """Largest logit change of each position over a few seeded perturbations of relative size 2^-22."""
    embeddings = model.get_input_embeddings()(torch.tensor([list(row)], device=model.device))
    worst = np.zeros(len(clean), np.float32)
    for factor in factors(embeddings.shape, draws):
        out = model(inputs_embeds=embeddings * factor.to(embeddings.device), use_cache=False, logits_to_keep=kept)
        worst = np.maximum(worst, np.abs(out.logits[0].float().cpu().numpy() - clean).max(1))
    return worst


def factors(shape: Sequence[int], draws: int) -> Iterator[torch.Tensor]:
    """Factors of embeddings that the noise is measured with, the same for every row of a length."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        yield 1 + 2.0**-22 * torch.randn(tuple(shape), generator=generator)


Texts = tuple[tuple[int, ...], ...]
Margins = tuple[tuple[float, ...], ...]


def _greedy(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[Texts, Margins]:
    """Greedy continuations, and the gap between the two best logits at each token.

    Prompts of one length run as one batch, since a step of a batch reads the weights once.
    """
    found: dict[int, tuple[list[int], list[float]]] = {}
    for length in sorted({len(prompt) for prompt in prompts}):
        same = [k for k, prompt in enumerate(prompts) if len(prompt) == length]
        found.update(zip(same, _continued(model, [list(prompts[k]) for k in same], new_tokens), strict=True))
    ordered = [found[k] for k in range(len(prompts))]
    return tuple(tuple(ids) for ids, _ in ordered), tuple(tuple(gaps) for _, gaps in ordered)


def _continued(model: Any, prompts: list[list[int]], new_tokens: int) -> list[tuple[list[int], list[float]]]:
    step, cache = torch.tensor(prompts, device=model.device), None
    ids, gaps = step[:, :0], torch.zeros(len(prompts), 0, device=model.device)
    # transformers 5.24 renames the argument and warns of the old name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(new_tokens):
        out = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = getattr(out, name)
        top = out.logits[:, -1].float().topk(2)
        step = top.indices[:, :1]
        ids, gaps = torch.cat([ids, step], 1), torch.cat([gaps, top.values[:, :1] - top.values[:, 1:]], 1)
    return list(zip(ids.tolist(), gaps.tolist(), strict=True))


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
    left = list(matrices)
    found = give_known(model, left)
    if left:
        raise unknown(left[0].name)
    return found


def give_known(
    module: nn.Module, left: list[StoredMatrix], named: Callable[[str], str] = lambda name: name
) -> list[Fidelity]:
    """Put those of the matrices that are the module's into it, in place, and take them out of the list.

    Args:
        named: name of a module in `module` -> its name in the whole model.

    Raises:
        CorruptError: the graph has a part of a module's matrix only.
    """
    found = []
    kinds = {True: _tables(module, named), False: _products(module, named)}
    for stored in list(left):
        own = kinds[stored.lookup]
        if any(not r.taken.all() for r in own) and (fidelity := _give(own, stored)) is not None:
            found.append(fidelity)
            left.remove(stored)
    torn = [rows.name for kind in kinds.values() for rows in kind if 0 < rows.taken.sum() < len(rows.taken)]
    if torn:
        raise CorruptError(f"the graph has only a part of {torn[0]} in codes")
    return found


def unknown(name: str, place: int = 0) -> CorruptError:
    """The error of a graph's matrix, or of its rows from `place` on, that the model does not have."""
    return CorruptError(f"{name} of the graph, from row {place} on, matches no matrix of the model")


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def _tables(model: Any, named: Callable[[str], str]) -> list[_Rows]:
    return [_Rows(named(n), m.weight.detach()) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]


def _products(model: Any, named: Callable[[str], str]) -> list[_Rows]:
    """The matrices of products: of linear layers and routers, and those of all experts, one below the other."""
    found = []
    for name, module in model.named_modules():
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2 and part == "weight" and not isinstance(module, nn.Embedding):
                found.append(_Rows(named(name), parameter.detach()))
            elif parameter.ndim == 3:
                found.append(_Rows(named(f"{name}.{part}"), _stacked(module, parameter)))
    return found


def _stacked(experts: Any, parameter: nn.Parameter) -> torch.Tensor:
    """A view of the experts' matrices as rows [experts * N, K]; the parameter is stored in this order afterwards."""
    if getattr(experts, "is_transposed", False):
        parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
        return parameter.data.transpose(1, 2).flatten(0, 1)
    parameter.data = parameter.data.contiguous()
    return parameter.data.flatten(0, 1)


def _give(candidates: Sequence[_Rows], stored: StoredMatrix) -> Fidelity | None:
    """Put a matrix into the most similar rows; None if its first rows are not like any, and nothing has changed."""
    if stored.shape and not any(_may_be(rows, stored) for rows in candidates):
        return None
    blocks = stored.blocks()
    count, width = blocks.codes.shape
    if stored.lookup and 0 < width - (own := candidates[0].weight.shape[1]) < blocks.size:
        width = own  # a table has whole blocks, and the graph cuts the rows that it looks up
    names, place, worst, at = [], 0, 0.0, 0
    while place < count:
        nearest = _nearest(candidates, blocks, place, width)
        if nearest is None and not place:
            return None
        if nearest is None:
            raise unknown(stored.name, place)
        rows, first, part = nearest
        for start in range(0, part, _ROWS):
            here = slice(place + start, place + min(start + _ROWS, part))
            target = rows.weight[first + start : first + min(start + _ROWS, part)]
            far, row = _put(target, blocks.rows(here), width)
            if far > worst:
                worst, at = far, here.start + row
        rows.taken[first : first + part] = True
        names.append(rows.name)
        place += part
    return Fidelity(stored.name, tuple(names), worst, at)


def _may_be(rows: _Rows, stored: StoredMatrix) -> bool:
    """Whether a matrix of this shape can have rows like these; a table may have whole blocks."""
    return rows.weight.shape[1] <= stored.shape[1] if stored.lookup else rows.weight.shape[1] == stored.shape[1]


def _put(target: torch.Tensor, blocks: Blocks, width: int) -> tuple[float, int]:
    """Give rows the values of blocks, in place; their largest distance before, in steps, and its row."""
    values = torch.from_numpy(blocks.values)[:, :width]
    steps = torch.from_numpy(blocks.scales).abs().clamp(min=1e-30)  # scale 0: any other value is far
    ratio = _largest_of_blocks((values - target.float().cpu()).abs(), blocks.size) / steps
    with torch.no_grad():
        target.copy_(values)
    return float(ratio.max()), int(ratio.amax(1).argmax())


def _largest_of_blocks(away_NK: torch.Tensor, size: int) -> torch.Tensor:
    """Largest value of each block of a row: [N, blocks]."""
    padded = nn.functional.pad(away_NK, (0, -away_NK.shape[1] % size))
    return padded.view(len(padded), -1, size).amax(2)


def _nearest(candidates: Sequence[_Rows], blocks: Blocks, place: int, width: int) -> tuple[_Rows, int, int] | None:
    """The free rows most like a matrix from row `place` on: their module, the first row, and how many rows."""
    best: tuple[float, _Rows, int, int] | None = None
    for rows in candidates:
        if rows.weight.shape[1] != width:
            continue
        for first, end in rows.runs():
            count = min(end - first, len(blocks.codes) - place)
            chosen = torch.linspace(0, count - 1, min(count, _SAMPLED)).round().long()
            values = torch.from_numpy(blocks.rows(place + chosen.numpy()).values)[:, :width]
            like = _likeness(rows.weight[first + chosen.to(rows.weight.device)], values)
            if best is None or like > best[0]:
                best = (like, rows, first, count)
    return None if best is None or best[0] < _LIKE else best[1:]


def _likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """Median cosine of rows."""
    return float(nn.functional.cosine_similarity(one.float().cpu(), other, dim=1).median())


def give_floats(model: Any, weights: Sequence[Path], named: Callable[[str], str] = lambda name: name) -> None:
    """Put a quantised checkpoint's floating-point tensors (norms, biases) into the model, in place.

    Args:
        named: as in `give_known`.
    """
    from safetensors import safe_open

    ours = {named(name): value for name, value in model.state_dict().items()}
    for path in weights:
        with torch.no_grad(), safe_open(str(path), framework="pt") as file:
            for name in set(file.keys()) & ours.keys():
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and ours[name].shape == tensor.shape:
                    ours[name].copy_(tensor)


def nearest_maps(maps: Mapping[int, Mixer], matrices: Sequence[StoredMatrix]) -> dict[int, Mixer]:
    """Fitted mixers with a graph's matrices; a matrix that the graph lacks stays as fitted.

    Raises:
        CorruptError: a matrix of the graph matches none of these mixers.
    """
    numbers = {(i, part): torch.from_numpy(m.copy()) for i, a in maps.items() for part, m in a.matrices().items()}
    free = [_Rows(f"{i}.{part}", tensor) for (i, part), tensor in numbers.items()]
    for stored in matrices:
        if _give(free, stored) is None:
            raise unknown(stored.name)
    return {i: a.with_matrices({part: numbers[i, part].numpy() for part in a.matrices()}) for i, a in maps.items()}
