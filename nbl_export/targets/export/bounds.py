"""Refuses a checkpoint before a source of decoder graphs allocates what its configuration states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.errors import NblError
from nbl_export.model.checkpoint.pretrained import check_weights, config_of, reason_of
from nbl_export.model.memory import available_bytes

__all__ = ["check_bounds"]

# The GenAI builder (0.18, `make_rotary_embedding_caches_from_scratch`) and mobius make rotary tables for these.
_POSITIONS = ("max_position_embeddings", "original_max_position_embeddings", "seq_length")
_TABLES, _ITEM = 4, 4  # angles, the angles twice, sines and cosines; float32


def check_bounds(checkpoint: Path) -> None:
    """Compare a configuration with the weights in the files, and its rotary tables with the available memory.

    Raises:
        NblError: a weight is missing or has another shape, or the tables do not fit.
    """
    try:
        config = config_of(checkpoint)
        check_weights(checkpoint)
    except NblError:
        raise
    except Exception as error:  # transformers raises many kinds on a damaged folder
        raise NblError(f"{checkpoint} cannot be exported: {reason_of(error)}") from error
    positions = max(_whole(getattr(config, name, 0)) for name in _POSITIONS)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needed, available = _TABLES * _ITEM * positions * head, available_bytes()
    if needed > available:
        raise NblError(
            f"{checkpoint} states {positions} positions, whose rotary tables need {needed / 2**30:.1f} GiB, and "
            f"{available / 2**30:.1f} GiB of memory is available; state fewer in config.json"
        )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0
