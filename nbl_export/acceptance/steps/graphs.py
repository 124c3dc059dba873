"""The step that compares captured decode steps with plain ones, bit for bit, through changes of the batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nbl_export.acceptance.compare import advance
from nbl_export.acceptance.parts import Opened, Target
from nbl_export.acceptance.steps.plain import two_rows
from nbl_export.acceptance.verdict import Failed, Notes

__all__ = ["Course", "course", "graphs_against_plain"]

_BATCHES = (1, 2, 1)
_STEPS = 4  # of decode, before and after the chunk between them

Course = dict[str, np.ndarray]  # logits [B, V] by what was run


def graphs_against_plain(target: Target, notes: Notes) -> None:
    """Captured steps give the bits of plain steps: batch 1, 2 and 1 again, with a prefill between the replays."""
    plain: dict[str, tuple[Course, Course]] = {}
    with target.opened(notes, graphs=False) as sessions:
        for opened in sessions:
            plain[opened.subject] = course(opened, target, notes), course(opened, target, notes)
    with target.opened(notes, graphs=True) as sessions:
        for opened in sessions:
            found = course(opened, target, notes)
            captured = target.parts.library.runtime_graphs or opened.inside.captured()
            notes.see(f"{opened.subject}, decode is captured by", _who(target, captured))
            _require_equal(opened.subject, found, *plain[opened.subject], notes)
            if not captured:
                raise Failed(f"{opened.subject}: the decode step was not captured; it runs right, and slower")


def _who(target: Target, captured: bool) -> str:
    if target.parts.library.runtime_graphs:
        return "the library, which does not say whether it does"
    return "the runner" if captured else "nobody"


def course(opened: Opened, target: Target, notes: Notes) -> Course:
    """Logits of prefills and decode steps of batch 1, 2 and 1 again; two rows if the engine takes them."""
    found: Course = {}
    for turn, batch in enumerate(_BATCHES):
        if batch > 1 and not two_rows(opened):
            continue
        notes.doing(f"running batch {batch} on {opened.subject}, turn {turn}")
        for name, logits in _steps(opened, target, batch):
            found[f"turn {turn}, batch {batch}, {name}"] = logits
    return found


def _steps(opened: Opened, target: Target, batch: int) -> Iterator[tuple[str, np.ndarray]]:
    """A prefill, decode steps, a chunk of two tokens, decode steps."""
    texts = target.material.texts.ids
    rows = [(texts[-1 - b] * 3)[: 4 + 2 * _STEPS] for b in range(batch)]
    parts = [(0, 2), *((k, k + 1) for k in range(2, 2 + _STEPS))]
    middle = 2 + _STEPS
    parts += [(middle, middle + 2), *((k, k + 1) for k in range(middle + 2, middle + 2 + _STEPS))]
    opened.decoder.begin(batch)
    for start, end in parts:
        if end > opened.decoder.slots:
            return
        kind = "a step" if end - start == 1 else "a chunk"
        yield f"{kind} at {start}", advance(opened, [row[start:end] for row in rows])


def _require_equal(subject: str, found: Course, plain: Course, again: Course, notes: Notes) -> None:
    """Every logit is the plain one; where plain steps do not repeat themselves, it differs by no more than they do."""
    worst, loose = "", 0.0
    for name, expected in plain.items():
        noise = float(np.abs(again[name] - expected).max())
        loose = max(loose, noise)
        if not worst and float(np.abs(found[name] - expected).max()) > noise:
            worst = name
    notes.see(f"{subject}, steps compared bit for bit", len(plain))
    notes.see(f"{subject}, largest difference of two plain runs", loose)
    if worst:
        difference = float(np.abs(found[worst] - plain[worst]).max())
        raise Failed(f"{subject}, {worst}: with CUDA graphs a logit differs by {difference:.3g} from the plain step")
