"""What the torch model says: logits and greedy text that graphs are held to. Plain numpy comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.blocks import multiplier_of
from nbl_export.linearize import AffineAttention, linearize, switched
from nbl_export.nbits import StoredMatrix
from nbl_export.records import AffineMap
from nbl_export.torch_matrices import Fidelity, give, give_floats, look_up, nearest_maps
from nbl_export.verify import Probe, shown_positions

__all__ = ["Reference", "make_reference", "references", "references_with_codes"]

_NOISE_DRAWS = 4
_NOISE_DRAWS_LONG = 1


@dataclass(frozen=True)
class Reference:
    """Teacher-forced logits of each row, [length, V] float32, and greedy continuations of the prompts.

    `noise` [length] is how far the logits of each position move when the embeddings are perturbed by a few
    float32 roundings: two correct float32 engines can differ by some multiple of it. It is small everywhere in
    an ordinary model, and large at tokens that stand on the edge of a massive activation (a token that has
    half become an attention sink), which linearized early layers make more frequent.

    `margins` are the gaps between best and second-best logit at each greedy step: where a gap is below the
    numerical noise, another engine may rightly choose the other token.

    `long` [positions, V] and its noise are of the long row, at `verify.shown_positions`.
    """

    logits: tuple[np.ndarray, ...]
    noise: tuple[np.ndarray, ...]
    greedy: tuple[tuple[int, ...], ...]
    margins: tuple[tuple[float, ...], ...]
    long: np.ndarray | None = None
    long_noise: np.ndarray | None = None


def references(model: Any, maps: Mapping[int, AffineMap], tap: str, probe: Probe) -> dict[str, Reference]:
    """What the original says and what it says with maps; the model is as before afterwards."""
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
    """The same with the very matrices of quantised graphs, and how far these are from the model's. Changes the model.

    Args:
        stored: matrices of the graphs, by subject. Those that the NBL graph adds are ours: maps, a table of tokens.
        floats: safetensors of the quantised checkpoint that the codes come from, whose norms go with them.

    Raises:
        CorruptError: a matrix is none of the model's.
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
    """Run the torch model: one full causal forward a row (no cache, no padding), greedy with its cache."""
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
    """kept: positions whose logits are made; 0 is all of them."""
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
