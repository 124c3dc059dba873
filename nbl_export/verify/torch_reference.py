"""The torch model's reference: logits and greedy text that graphs are compared with, as numpy arrays."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.mixers.base import Mixer
from nbl_export.model.linearize import linearize, replaced
from nbl_export.model.torch_matrices import give, give_floats, look_up, nearest_maps
from nbl_export.records.quantised import Fidelity, StoredMatrix
from nbl_export.verify.ladder import Probe, Reference, shown_positions

__all__ = [
    "Codes",
    "make_reference",
    "noise_with_codes",
    "noise_with_maps",
    "references",
    "references_with_codes",
    "row_logits",
    "with_noise",
]

_NOISE_DRAWS = 4
_NOISE_DRAWS_LONG = 1


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
    """Matrices of the quantised graphs, by subject. The NBL graph adds maps and possibly a token table.

    floats: safetensors of the quantised checkpoint that the codes come from; its norms belong to the codes.
    rows_VD: of the token table; they count if the graph does not store the table in codes.
    """

    stored: Mapping[str, Sequence[StoredMatrix]]
    floats: Sequence[Path] = ()
    rows_VD: np.ndarray | None = None


def _give_original(model: Any, codes: Codes) -> list[Fidelity]:
    give_floats(model, codes.floats)
    return give(model, codes.stored["original"])


def _give_maps(model: Any, maps: Mapping[int, Mixer], tap: str, codes: Codes) -> None:
    ours = [matrix for matrix in codes.stored["nbl"] if matrix.name.startswith("/nbl/")]
    tables = [matrix.blocks().values for matrix in ours if matrix.lookup]
    rows_VD = tables[0] if tables else codes.rows_VD
    linearize(model, nearest_maps(maps, [m for m in ours if not m.lookup]), tap)
    if rows_VD is not None:
        kept = next(i for i in range(model.config.num_hidden_layers) if i not in maps)
        look_up(model, rows_VD, kept)


def make_reference(model: Any, probe: Probe) -> Reference:
    """Run the torch model: one causal forward a row (no cache, no padding), and greedy text with its cache.

    The noise is not measured.
    """
    with torch.inference_mode():
        logits = tuple(_logits(model, row) for row in probe.rows)
        long = _logits(model, probe.long, _shown(probe)) if probe.long else None
        texts, margins = _greedy(model, probe.prompts, probe.new_tokens)
    quiet = tuple(np.zeros(len(row), np.float32) for row in probe.rows)
    return Reference(logits, quiet, texts, margins, long, None if long is None else np.zeros(len(long), np.float32))


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
        noise = tuple(_noise(model, row, clean, _NOISE_DRAWS) for row, clean in rows)
        long = None
        if reference.long is not None:
            long = _noise(model, probe.long, reference.long, _NOISE_DRAWS_LONG, _shown(probe))
    return dataclasses.replace(reference, noise=noise, long_noise=long, noisy=True)


def _shown(probe: Probe) -> torch.Tensor:
    return torch.from_numpy(shown_positions(len(probe.long)))


def row_logits(model: Any, row: Sequence[int]) -> np.ndarray:
    """Logits [T, V] of a row of tokens, without a cache."""
    with torch.inference_mode():
        return _logits(model, row, 0)


def _logits(model: Any, row: Sequence[int], kept: torch.Tensor | int = 0) -> np.ndarray:
    """kept: positions whose logits are computed; 0 means all positions."""
    out = model(torch.tensor([list(row)]), use_cache=False, logits_to_keep=kept)
    found: np.ndarray = out.logits[0].float().numpy()
    return found


def _noise(model: Any, row: Sequence[int], clean: np.ndarray, draws: int, kept: torch.Tensor | int = 0) -> np.ndarray:
    """Largest logit change of each position over a few seeded perturbations of relative size 2^-22."""
    embeddings = model.get_input_embeddings()(torch.tensor([list(row)]))
    generator = torch.Generator().manual_seed(0)
    worst = np.zeros(len(clean), np.float32)
    for _ in range(draws):
        factor = 1 + 2.0**-22 * torch.randn(embeddings.shape, generator=generator)
        out = model(inputs_embeds=embeddings * factor, use_cache=False, logits_to_keep=kept)
        worst = np.maximum(worst, np.abs(out.logits[0].float().numpy() - clean).max(1))
    return worst


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
    step, cache = torch.tensor(prompts), None
    ids, gaps = step[:, :0], torch.zeros(len(prompts), 0)
    # transformers 5.24 renames the argument and warns of the old name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(new_tokens):
        out = model(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
        cache = getattr(out, name)
        top = out.logits[:, -1].float().topk(2)
        step = top.indices[:, :1]
        ids, gaps = torch.cat([ids, step], 1), torch.cat([gaps, top.values[:, :1] - top.values[:, 1:]], 1)
    return list(zip(ids.tolist(), gaps.tolist(), strict=True))
