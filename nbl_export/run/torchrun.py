"""Processes of torchrun: process 0 leads the run, and the other processes follow its orders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nbl_export.parallel.ranks import Ranks, collect_batches

__all__ = ["led"]


def follow(ranks: Ranks) -> None:
    """Work for process 0 until it has no more work.

    Raises:
        NblError: a process has failed.
    """
    while (order := ranks.share(None)) is not None:
        model, error = None, None
        try:
            model = _model(order["checkpoint"])
        except Exception as failed:
            error = str(failed)
        ranks.agree(error)
        _WORK[order["work"]](ranks, ranks.place(model), order)


@functools.cache
def _model(directory: str) -> Any:
    from nbl_export.model.checkpoint import load

    return load.load_model(Path(directory))


def _calibrate(ranks: Ranks, model: Any, order: dict[str, Any]) -> None:
    from nbl_export.calibrate import collect
    from nbl_export.mixers import kind_of

    with collect.Collection(model, order["taps"], kind_of(order["kind"]), narrow=order["narrow"]) as found:
        found.refer(order["windows"])
        ranks.share_reference(found)
        collect_batches(ranks, found, collect.batches(order["windows"]), order["done"], lambda: False, lambda _: None)


def _distill(ranks: Ranks, model: Any, order: dict[str, Any]) -> None:
    from nbl_export.distill.training import Callbacks, DistillSettings, TrainingText, distill
    from nbl_export.mixers import kind_of

    maps = {layer: kind_of(kind).from_tensors(tensors) for layer, (kind, tensors) in order["maps"].items()}
    text, settings = TrainingText(order["windows"], order["held"]), DistillSettings(**order["settings"])
    distill(model, maps, order["tap"], text, settings, Callbacks(ranks=ranks))


_WORK: dict[str, Callable[[Ranks, Any, dict[str, Any]], None]] = {"calibrate": _calibrate, "distill": _distill}


@contextlib.contextmanager
def led(ranks: Ranks) -> Iterator[bool]:
    """Yield True on the leading process. On other processes, follow its orders first, then yield False."""
    if ranks.rank:
        follow(ranks)
        yield False
        return
    try:
        yield True
    finally:
        ranks.close()
