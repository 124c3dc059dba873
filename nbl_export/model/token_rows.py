"""The first kept layer's input for each token. If all lower layers are replaced, this input depends on the token alone.

    token v ─► embedding ─► layer 0, mixer for attention ─► ... ─► row v          `rewrite.token_table` looks up row v

Layers are loaded one at a time (`one_layer`), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from nbl_export.mixers import layers_below
from nbl_export.mixers.base import Mixer
from nbl_export.model.blocks import multiplier_of, run_from
from nbl_export.model.checkpoint.pretrained import config_of
from nbl_export.model.linearize import replace_attention
from nbl_export.model.one_layer import WeightReader, one_layer

__all__ = ["token_rows"]

_TOKENS = 2048  # computed at once


def token_rows(checkpoint: Path, maps: Mapping[int, Mixer], tap: str) -> np.ndarray | None:
    """Rows [V, D] in float32; None if layer 0 is kept.

    Args:
        checkpoint: directory with config.json and safetensors of the original.
        maps: of all replaced layers; at least one layer has no map.

    Raises:
        NblError: a weight is missing or damaged.
    """
    config, shelf = config_of(checkpoint), WeightReader(checkpoint)
    rows: torch.Tensor | None = None
    for index in layers_below(maps):
        decoder = one_layer(config, index, shelf)
        replace_attention(decoder, {0: maps[index].module(multiplier_of(config))}, tap)
        with torch.inference_mode():
            if rows is None:
                ids_V1 = torch.arange(decoder.embed_tokens.num_embeddings)[:, None]
                parts = [decoder(input_ids=ids, use_cache=False).last_hidden_state for ids in ids_V1.split(_TOKENS)]
            else:
                parts = [run_from(decoder, part[:, None]) for part in rows.split(_TOKENS)]
        rows = torch.cat(parts)[:, 0]
    return None if rows is None else rows.numpy()
