"""Asks a verified decoder, on a CPU, what the engine on the GPU will be compared with.

texts ─► decoder of each subject (float32 twin) ─► logits after four steps, cache rows, the last slots ─┐
         its graph cut behind the first attention ─► hidden values and caches                           ┴► Material
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.acceptance.material import (
    CACHE_ROWS,
    LAST_TOKENS,
    OneLayer,
    Texts,
)
from nbl_export.targets.tensorrt.static.host import StaticDecoder
from nbl_export.targets.tensorrt.static.on_ort import OrtSession

__all__ = ["LEAST_TOKENS", "choose_texts", "one_layer", "said_by"]

LEAST_TOKENS = 6  # of a text: four steps, one of them of two tokens
_LENGTHS = (6, 9, 16, 24, 33, 41, 57, 64)
_LIKELIEST, _OTHERS = 32, 224  # tokens whose logits are kept


def choose_texts(ids: Sequence[int], slots: int) -> Texts:
    """Eight parts of a text, of different lengths where the slots allow it.

    Args:
        ids: at least `LEAST_TOKENS` tokens.
        slots: most tokens of a part, at least `LEAST_TOKENS`.
    """
    rows = []
    for k, wanted in enumerate(_LENGTHS):
        length = min(wanted, slots, len(ids))
        start = k * (len(ids) - length) // len(_LENGTHS)
        rows.append(tuple(int(i) for i in ids[start : start + length]))
    return Texts(tuple(rows), tuple(_marks(len(row)) for row in rows))


def _marks(length: int) -> tuple[int, ...]:
    """Ends of the four steps: a first chunk, two tokens, a chunk behind a cache, one token."""
    first = max(1, (length - 3) // 2)
    return first, first + 2, length - 1, length


def said_by(decoder: Any, subject: str, texts: Texts) -> dict[str, np.ndarray]:
    """Arrays of a subject, see `material`; caches and last slots of decoders of the static form alone.

    Args:
        decoder: a `GraphDecoder`.
    """
    columns, logits = [], []
    caches: dict[str, list[np.ndarray]] = {}
    for number, (row, marks) in enumerate(zip(texts.ids, texts.marks, strict=True)):
        decoder.begin(1)
        after, start = [], 0
        for end in marks:
            after.append(decoder.step(np.array([row[start:end]], np.int64))[0, -1])
            start = end
        chosen = [_chosen(line_V) for line_V in after]
        columns.append(chosen)
        logits.append([line_V[c] for line_V, c in zip(after, chosen, strict=True)])
        if isinstance(decoder, StaticDecoder) and number < CACHE_ROWS:
            for name in _kept_caches(decoder):
                rows = _cache(decoder, name)[0][:, [0, len(row) - 1]]
                caches.setdefault(name, []).append(rows.transpose(1, 0, 2))
    found = {"columns": np.array(columns, np.int32), "logits": np.array(logits, np.float32)}
    found |= {f"cache.{name}": np.array(rows, np.float32) for name, rows in caches.items()}
    if isinstance(decoder, StaticDecoder):
        found |= _last_slots(decoder, texts)
    return {f"{subject}.{name}": array for name, array in found.items()}


def _chosen(logits_V: np.ndarray) -> np.ndarray:
    """Tokens whose logits are kept: the likeliest ones first, then others spread over the vocabulary."""
    size = len(logits_V)
    likeliest = np.argsort(-logits_V)[:_LIKELIEST]
    others = np.setdiff1d(np.linspace(0, size - 1, min(_OTHERS, size)).astype(np.int64), likeliest)
    count = min(size, _LIKELIEST + _OTHERS // 2)
    return np.concatenate([likeliest, others])[:count]


def _kept_caches(decoder: StaticDecoder) -> tuple[str, ...]:
    """The caches of the first and of the last layer that has some."""
    layers = decoder.contract.cache_layers
    return tuple(f"past_key_values.{n}.{k}" for n in sorted({layers[0], layers[-1]}) for k in ("key", "value"))


def _cache(decoder: StaticDecoder, name: str) -> np.ndarray:
    assert isinstance(decoder.session, OrtSession)
    return decoder.session.read_cache(name)


def _last_slots(decoder: StaticDecoder, texts: Texts) -> dict[str, np.ndarray]:
    """Tokens in the last slots of an empty cache: the largest positions, without running all tokens before them."""
    ids = np.array([texts.ids[0][:LAST_TOKENS]], np.int64)
    decoder.begin(1)
    line_V = decoder.session.run(ids, [decoder.slots - LAST_TOKENS], [LAST_TOKENS])[0, -1]
    chosen = _chosen(line_V)
    return {"last.columns": chosen.astype(np.int32), "last.logits": line_V[chosen].astype(np.float32)}


def one_layer(subject: str, shipped: bytes, twin: Path, texts: Texts) -> OneLayer:
    """What the float32 twin of a cut graph says of a few tokens.

    Args:
        shipped: the cut graph at the deployed precision.
        twin: the cut graph in float32, with its weights.
    """
    ids = texts.ids[0][:LAST_TOKENS]
    session = OrtSession(twin)
    session.begin(1)
    hidden_TD = session.run(np.array([ids], np.int64), [0], [len(ids)])[0]
    names = [i.name for i in session.contract.inputs if i.name.startswith("past_key_values.")]
    expected: Mapping[str, np.ndarray] = {
        "hidden": hidden_TD, **{name: session.read_cache(name)[0][:, : len(ids)] for name in names}
    }  # fmt: skip
    session.close()
    return OneLayer(subject, shipped, ids, {k: np.ascontiguousarray(v, np.float32) for k, v in expected.items()})
