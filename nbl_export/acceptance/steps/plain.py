"""The step that runs the whole decoder without CUDA graphs, and compares logits and caches with the float32 twin.

each text      first chunk ─ chunk of two tokens ─ chunk behind a cache ─ single token
two texts      the same four steps as one batch of different lengths
last slots     a few tokens at the largest positions
"""

from __future__ import annotations

import numpy as np

from nbl_export.acceptance.compare import advance, distance, require_close
from nbl_export.acceptance.material import (
    CACHE_ROWS,
    LAST_TOKENS,
    STEPS_OF_A_TEXT,
    Material,
)
from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.verdict import (
    DEFECT,
    GRAPH,
    RUNNER,
    Failed,
    Notes,
)

__all__ = ["plain", "two_rows"]

_BATCH = (7, 2)  # texts of the batch: the longest and a short one


def plain(target: Target, notes: Notes) -> None:
    """Chunks, a batch of different lengths and the last slots give the twin's logits and cache rows."""
    material = target.material
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            _require_empty(opened)
            _texts(opened, material, notes)
            _last_slots(opened, material, notes)
            _batch(opened, material, notes)


def _require_empty(opened: Opened) -> None:
    opened.decoder.begin(1)
    for name in opened.inside.caches:
        if not np.array_equal(cache := opened.inside.read_cache(name), np.zeros_like(cache)):
            raise Failed(f"{opened.subject}: {name} is not zero at the begin of a sequence", RUNNER, DEFECT)


def _texts(opened: Opened, material: Material, notes: Notes) -> None:
    """All texts one by one; caches first, because they tell more about the cause."""
    columns_TSC = material.of(opened.subject, "columns")
    got = np.zeros(columns_TSC.shape, np.float32)
    for number, (row, marks) in enumerate(zip(material.texts.ids, material.texts.marks, strict=True)):
        opened.decoder.begin(1)
        start = 0
        for step, end in enumerate(marks):
            notes.doing(f"running {STEPS_OF_A_TEXT[step]} of text {number} on {opened.subject}, {end - start} tokens")
            got[number, step] = advance(opened, [row[start:end]])[0, columns_TSC[number, step]]
            start = end
        if number < CACHE_ROWS:
            _require_rows(opened, material, number, notes)
    expected = material.of(opened.subject, "logits")
    for step, title in enumerate(STEPS_OF_A_TEXT):
        name = f"{opened.subject}, logits after the {title}"
        require_close(notes, name, got[:, step], expected[:, step], material.limit)


def _require_rows(opened: Opened, material: Material, number: int, notes: Notes) -> None:
    """The cache rows of a text's first and last token are the twin's, in the slots of their positions.

    Values first: keys are rotated by their position, so that a key in another slot is another key.
    """
    length = len(material.texts.ids[number])
    for name in sorted(material.caches(opened.subject), key=lambda name: (name.endswith("key"), name)):
        cache_HSD = opened.inside.read_cache(name)[0]
        for place, row in zip((0, length - 1), material.of(opened.subject, f"cache.{name}")[number], strict=True):
            found = distance(cache_HSD[:, place], row)
            if found <= material.limit:
                continue
            elsewhere = [s for s in range(cache_HSD.shape[1]) if distance(cache_HSD[:, s], row) <= material.limit]
            where = f"{opened.subject}, {name}, text {number}"
            if elsewhere:
                raise Failed(f"{where}: the row of token {place} is in slot {elsewhere[0]}", RUNNER, DEFECT)
            if not cache_HSD[:, place].any():
                raise Failed(f"{where}: slot {place} is empty after {length} tokens, so the update was lost", RUNNER)
            notes.see(f"{where}, row of token {place}", found, material.limit)
            raise Failed(f"{where}: the row of token {place} differs by {found:.3g}, {material.limit:g} allowed", GRAPH)


def _last_slots(opened: Opened, material: Material, notes: Notes) -> None:
    """Tokens in the last slots of an empty cache: the largest positions of the rotary tables and of the mask."""
    notes.doing(f"running the last slots on {opened.subject}")
    ids = np.array([material.texts.ids[0][:LAST_TOKENS]], np.int64)
    opened.decoder.begin(1)
    logits = opened.session.run(ids, [opened.decoder.slots - LAST_TOKENS], [LAST_TOKENS])[0, -1]
    found = logits[material.of(opened.subject, "last.columns")]
    expected = material.of(opened.subject, "last.logits")
    require_close(notes, f"{opened.subject}, logits at the last slot", found, expected, material.limit)


def two_rows(opened: Opened) -> bool:
    """Whether the engine takes two rows in both profiles."""
    return all(profile.batch[2] >= 2 for profile in opened.record.profiles)


def _batch(opened: Opened, material: Material, notes: Notes) -> None:
    """Two texts of different length as one batch, step by step."""
    if not two_rows(opened):
        notes.see(f"{opened.subject}, batch of two", "not run: the engine takes one row (--max-batch)")
        return
    columns, expected = material.of(opened.subject, "columns"), material.of(opened.subject, "logits")
    opened.decoder.begin(2)
    starts = [0, 0]
    for step, title in enumerate(STEPS_OF_A_TEXT):
        ends = [material.texts.marks[text][step] for text in _BATCH]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        parts = [material.texts.ids[text][s:e] for text, s, e in zip(_BATCH, starts, ends, strict=True)]
        padded = [[*part, *[0] * (max(counts) - len(part))] for part in parts]
        notes.doing(f"running {title} of a batch of two on {opened.subject}")
        logits = advance(opened, padded, counts)
        starts = ends
        got = np.stack([logits[row, columns[text, step]] for row, text in enumerate(_BATCH)])
        wanted = np.stack([expected[text, step] for text in _BATCH])
        require_close(notes, f"{opened.subject}, batch of two, after the {title}", got, wanted, material.limit)
