"""The steps that compare the decoder with itself: what lies behind the positions, and prefill against single steps."""

from __future__ import annotations

import itertools

import numpy as np

from nbl_export.acceptance.compare import advance, require_close
from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.verdict import Failed, Notes

__all__ = ["behind_positions", "prefill_against_steps"]

_LARGE = 64.0  # products of two such rows stay finite in fp16 for heads of up to 256: 256 x 64 / 16 a key element
_STEPS = 48
_SHOWN = (1, 2, 7, 16, 33, _STEPS)  # tokens after which prefill and single steps are compared


def behind_positions(target: Target, notes: Notes) -> None:
    """Large finite values in the slots behind the positions change no bit of the logits."""
    row, marks = target.material.texts.ids[-1], target.material.texts.marks[-1]
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            if marks[-1] >= opened.decoder.slots:
                notes.see(f"{opened.subject}", "not run: the longest text fills the cache")
                continue
            for tokens in (1, 2):
                _require_equal(opened, row, tokens, notes)


def _require_equal(opened: Opened, row: tuple[int, ...], tokens: int, notes: Notes) -> None:
    """The last tokens of a text give the same logits twice, and again with the slots behind them filled."""
    start = len(row) - tokens
    what = f"{opened.subject}, {tokens} {'tokens' if tokens > 1 else 'token'} at position {start}"
    notes.doing(f"filling the slots behind the positions: {what}")
    opened.decoder.begin(1)
    advance(opened, [row[:start]])
    found = []
    for filled in (False, False, True):
        if filled:
            _fill(opened, start)
        found.append(advance(opened, [row[start:]])[0])
        opened.decoder.rewind(start)
    noise = float(np.abs(found[1] - found[0]).max())
    changed = float(np.abs(found[2] - found[0]).max())
    notes.see(f"{what}, largest change of a logit", changed, noise)
    if changed > noise:
        raise Failed(
            f"{what}: values behind the positions change a logit by {changed:.3g}, twice the same step by {noise:.3g}: "
            "the mask lets later slots through"
        )


def _fill(opened: Opened, start: int) -> None:
    for number, name in enumerate(opened.inside.caches):
        cache = opened.inside.read_cache(name)
        signs = np.random.default_rng(number).choice([-_LARGE, _LARGE], cache[:, :, start:].shape)
        cache[:, :, start:] = signs
        opened.inside.write_cache(name, cache)


def prefill_against_steps(target: Target, notes: Notes) -> None:
    """A chunk gives what its tokens give one by one, at the first positions and at the last."""
    material = target.material
    ids = list(itertools.chain.from_iterable(material.texts.ids))
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            slots = opened.decoder.slots
            count = min(_STEPS, slots // 2)
            for depth in sorted({0, slots - count}):
                row = [ids[k % len(ids)] for k in range(depth + count)]
                _compare(opened, row, depth, material.limit, notes)


def _compare(opened: Opened, row: list[int], depth: int, limit: float, notes: Notes) -> None:
    count = len(row) - depth
    opened.decoder.begin(1)
    if depth:
        notes.doing(f"filling {depth} slots of {opened.subject}")
        advance(opened, [row[:depth]])
    notes.doing(f"running {count} single steps behind {depth} tokens on {opened.subject}")
    steps = [advance(opened, [[token]])[0] for token in row[depth:]]
    for tokens in sorted({n for n in _SHOWN if n < count} | {count}):
        opened.decoder.rewind(depth)
        notes.doing(f"running a chunk of {tokens} tokens behind {depth} on {opened.subject}")
        chunk = advance(opened, [row[depth : depth + tokens]])[0]
        name = f"{opened.subject}, a chunk of {tokens} behind {depth} tokens against single steps"
        require_close(notes, name, steps[tokens - 1], chunk, limit)
