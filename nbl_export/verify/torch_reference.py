"""The torch model's reference: logits and greedy text that graphs are compared with, as numpy arrays."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.graph.nbits import StoredMatrix
from nbl_export.model.blocks import multiplier_of
from nbl_export.model.linearize import AffineAttention, linearize, switched
from nbl_export.model.torch_matrices import Fidelity, give, give_floats, look_up, nearest_maps
from nbl_export.records.plan import AffineMap
from nbl_export.verify.ladder import Probe, shown_positions
from nbl_export.verify.reference import Reference

__all__ = ["make_reference", "references", "references_with_codes"]

_NOISE_DRAWS = 4
_NOISE_DRAWS_LONG = 1


def references(model: Any, maps: Mapping[int, AffineMap], tap: str, probe: Probe) -> dict[str, Reference]:
    """References of the original model and of the model with maps. The model is unchanged afterwards."""
    original = make_reference(model, probe)
    modules = {i: AffineAttention(affine, multiplier_of(model.config)) for i, affine in maps.items()}
    for index, module in modules.items():
        module.layer_idx = index
    with switched(model.get_decoder(), modules, tap):
        return {"original": original, "nbl": make_reference(model, probe)}


def references_with_codes(
    model: Any,
    maps: Mapping[int, AffineMap],
    tap: str,
    probe: Probe,
    stored: Mapping[str, Sequence[StoredMatrix]],
    floats: Sequence[Path] = (),
) -> tuple[dict[str, Reference], list[Fidelity]]:
    """Like `references`, with the matrices of quantised graphs; also their distances from the model's matrices.

    This changes the model.

    Args:
        stored: matrices of the graphs, by subject. The NBL graph adds maps and possibly a token table.
        floats: safetensors of the quantised checkpoint that the codes come from; its norms belong to the codes.

    Raises:
        CorruptError: a matrix does not match any matrix of the model.
    """
    give_floats(model, floats)
    fidelity = give(model, stored["original"])
    original = make_reference(model, probe)
    ours = [matrix for matrix in stored["nbl"] if matrix.name.startswith("/nbl/")]
    tables = [matrix for matrix in ours if matrix.lookup]
    linearize(model, nearest_maps(maps, [m for m in ours if not m.lookup]), tap)
    for table in tables:
        kept = next(i for i in range(model.config.num_hidden_layers) if i not in maps)
        look_up(model, table.blocks().matrix, kept)
    return {"original": original, "nbl": make_reference(model, probe)}, fidelity


def make_reference(model: Any, probe: Probe) -> Reference:
    """Run the torch model: one causal forward a row (no cache, no padding), and greedy text with its cache."""
    with torch.inference_mode():
        logits = tuple(_logits(model, row) for row in probe.rows)
        noise = tuple(_noise(model, row, clean, _NOISE_DRAWS) for row, clean in zip(probe.rows, logits, strict=True))
        long = long_noise = None
        if probe.long:
            kept = torch.from_numpy(shown_positions(len(probe.long)))
            long = _logits(model, probe.long, kept)
            long_noise = _noise(model, probe.long, long, _NOISE_DRAWS_LONG, kept)
        continued = [_greedy(model, prompt, probe.new_tokens) for prompt in probe.prompts]
    texts, margins = tuple(ids for ids, _ in continued), tuple(gaps for _, gaps in continued)
    return Reference(logits, noise, texts, margins, long, long_noise)


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


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    ids: list[int] = []
    gaps: list[float] = []
    step, cache = torch.tensor([list(prompt)]), None
    # transformers 5.24 renames the argument and warns of the old name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for _ in range(new_tokens):
        out = model(input_ids=step, use_cache=True, **{name: cache})
        cache = getattr(out, name)
        top = out.logits[0, -1].float().topk(2)
        ids.append(int(top.indices[0]))
        gaps.append(float(top.values[0] - top.values[1]))
        step = torch.tensor([[ids[-1]]])
    return tuple(ids), tuple(gaps)
