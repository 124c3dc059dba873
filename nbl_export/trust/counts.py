"""Checks the numbers of a model by which libraries make lists, tables and modules before they read a weight.

config.json             num_hidden_layers: at most the layers of the tensors; num_labels: transformers names each
GGUF                    block_count, like num_hidden_layers
tokenizer_config.json   extra_ids, offset, ids of added tokens: transformers makes each token up to them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from nbl_export.errors import NblError
from nbl_export.records.decoder import MOST_LAYERS

__all__ = ["check_layers", "check_model_counts", "check_token_counts"]

_OF_LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d{1,9})\.")  # in a checkpoint, in a GGUF file
_MOST = 1 << 16
_MOST_TOKENS = 1 << 22
_NO_COUNT = re.compile("max|len|_id$")  # in names of numbers that no library counts up to


def check_layers(stated: Any, names: Iterable[str], where: object) -> None:
    """Compare a stated number of layers with the names of tensors; a value that is no number is left to its reader.

    Raises:
        NblError: more layers are stated than tensors have, or more than any decoder has.
    """
    if not isinstance(stated, int):
        return
    held = len({match[1] for match in map(_OF_LAYER.search, names) if match})
    if stated > min(held, MOST_LAYERS):
        reason = f"its weights have {held}" if stated > held else f"at most {MOST_LAYERS} are read"
        raise NblError(f"{where} states {stated} layers, and {reason}; fetch the model again")


def check_model_counts(settings: Mapping[str, Any], where: object) -> None:
    """Check one mapping of a config.json.

    Raises:
        NblError: a number is larger than that of any decoder.
    """
    labels, part = settings.get("num_labels"), settings.get("partial_rotary_factor")
    if isinstance(labels, int) and labels > _MOST:
        raise _too_many(where, "num_labels", labels)
    if isinstance(part, int | float) and part > 1:
        raise _too_many(where, "partial_rotary_factor", part)


def check_token_counts(settings: Mapping[str, Any], where: object) -> None:
    """Check a tokenizer_config.json.

    Raises:
        NblError: a number is larger than that of any tokenizer.
    """
    for key, value in settings.items():
        if isinstance(value, int) and value > _MOST and not _NO_COUNT.search(key):
            raise _too_many(where, key, value)
    added = settings.get("added_tokens_decoder")
    for number in added if isinstance(added, dict) else ():
        if number.strip().isdecimal() and int(number) > _MOST_TOKENS:
            raise _too_many(where, "added_tokens_decoder", int(number))


def _too_many(where: object, key: str, value: float) -> NblError:
    return NblError(f"{where} sets {key} to {value:.12g}, and no decoder has as many; fetch the model again")
