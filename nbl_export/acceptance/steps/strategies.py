"""The step for a library that compiles kernels when an engine loads: all kinds agree, and a second load compiles none.

NONE    kernels for all shapes            EAGER   compiled before the step      LAZY   compiled in the background
first load ─► kernels kept in a file ─► second load takes them
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from nbl_export.acceptance.compare import require_close
from nbl_export.acceptance.parts import Target
from nbl_export.acceptance.steps.graphs import Course, course
from nbl_export.acceptance.verdict import (
    DEFECT,
    RUNNER,
    Failed,
    LeftOut,
    Notes,
)
from nbl_export.targets.tensorrt.static.host import StaticRunner

__all__ = ["strategies"]

_OTHERS = ("EAGER", "LAZY")
_LOADS = ("first load", "second load")
_TOKENS = 4


def strategies(target: Target, notes: Notes) -> None:
    """Each kind of kernels gives the logits of the kernels for all shapes; the second load uses the first one's."""
    if not target.parts.library.jit:
        raise LeftOut("TensorRT compiles its kernels when it builds the plan")
    for subject, directory in target.engines:
        found: dict[str, Course] = {}
        for kernels in ("NONE", *_OTHERS):
            with target.open(subject, directory, notes, graphs=False, kernels=kernels) as opened:
                course(opened, target, notes)  # so that kernels compiled in the background have taken their place
                found[kernels] = course(opened, target, notes)
        for kernels in _OTHERS:
            got, expected = (np.concatenate([v.ravel() for v in found[k].values()]) for k in (kernels, "NONE"))
            require_close(notes, f"{subject}, {kernels} against NONE", got, expected, target.material.limit)
    for subject, directory in target.engines:
        for load in _LOADS:
            notes.doing(f"{load} of {subject}")
            _load(target, (subject, directory), load, notes)


def _load(target: Target, engine: tuple[str, Path], load: str, notes: Notes) -> None:
    """Load an engine as it is deployed, run a few tokens, and see whether kept kernels were used."""
    subject, directory = engine
    before = time.perf_counter()
    session = target.parts.deployed(directory)
    with StaticRunner(session, directory) as runner:
        runner.begin(2 * _TOKENS)
        for token in target.material.texts.ids[-1][:_TOKENS]:
            runner.append([token])
        notes.see(f"{subject}, {load}, seconds", time.perf_counter() - before)
        if session.kernels is None:
            raise Failed(f"{subject}: the runner keeps no kernels", RUNNER, DEFECT)
        ignored = session.kernels.ignored
        notes.see(f"{subject}, {load}, kept kernels", ignored or "used")
        if load == _LOADS[-1] and ignored:
            raise Failed(f"{subject}: the second load does not use the kernels of the first: {ignored}", RUNNER)
