"""What enters the first kept layer for each token of the vocabulary: with all layers below replaced, nothing else does.

    token v ─► embedding ─► layer 0, its map for attention ─► ... ─► row v          `rewrite.token_table` looks it up

Layers are loaded one at a time and alone (`layerwise`), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from nbl_export.blocks import multiplier_of, run_from
from nbl_export.layerwise import Shelf, one_layer
from nbl_export.linearize import AffineAttention, replace_attention
from nbl_export.pretrained import config_of
from nbl_export.records import AffineMap, layers_below

if TYPE_CHECKING:
    from nbl_export.job import Job

__all__ = ["rows_of", "token_rows"]

_TOKENS = 2048  # at once


def rows_of(job: Job, maps: Mapping[int, AffineMap]) -> np.ndarray | None:
    """As `token_rows`; None too where the job has no table. The checkpoint is touched only where there are rows."""
    return token_rows(job.checkpoint, maps, job.plan.tap) if job.has_token_table and layers_below(maps) else None


def token_rows(checkpoint: Path, maps: Mapping[int, AffineMap], tap: str) -> np.ndarray | None:
    """Rows [V, D] in float32; None where layer 0 is kept.

    Args:
        checkpoint: config.json and safetensors of the original.
        maps: of all replaced layers, of which at least one layer is none.

    Raises:
        NblError: a weight is missing or damaged.
    """
    config, shelf = config_of(checkpoint), Shelf(checkpoint)
    rows: torch.Tensor | None = None
    for index in layers_below(maps):
        decoder = one_layer(config, index, shelf)
        module = AffineAttention(maps[index], multiplier_of(config))
        replace_attention(decoder, {0: module}, tap)
        with torch.inference_mode():
            if rows is None:
                ids_V1 = torch.arange(decoder.embed_tokens.num_embeddings)[:, None]
                parts = [decoder(input_ids=ids, use_cache=False).last_hidden_state for ids in ids_V1.split(_TOKENS)]
            else:
                parts = [run_from(decoder, part[:, None]) for part in rows.split(_TOKENS)]
        rows = torch.cat(parts)[:, 0]
    return None if rows is None else rows.numpy()
