"""Processes of torchrun: process 0 leads the run, and the other processes follow its orders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nbl_export.parallel.peers import Peers, collect_batches

__all__ = ["led"]


def follow(peers: Peers) -> None:
    """Work for process 0 until it has no more work.

    Raises:
        NblError: a process has failed.
    """
    while (order := peers.share(None)) is not None:
        model, error = None, None
        try:
            model = _model(order["checkpoint"])
        except Exception as failed:
            error = str(failed)
        peers.agree(error)
        _WORK[order["work"]](peers, peers.place(model), order)


@functools.cache
def _model(directory: str) -> Any:
    from nbl_export.model.checkpoint import load

    return load.load_model(Path(directory))


def _calibrate(peers: Peers, model: Any, order: dict[str, Any]) -> None:
    from nbl_export.calibrate import hooks
    from nbl_export.mixers import kind_of

    with hooks.Collection(model, order["taps"], kind_of(order["kind"]), narrow=order["narrow"]) as found:
        found.refer(order["windows"])
        peers.share_reference(found)
        collect_batches(peers, found, hooks.batches(order["windows"]), order["done"], lambda: False, lambda _: None)


def _distill(peers: Peers, model: Any, order: dict[str, Any]) -> None:
    from nbl_export.distill.settings import DistillSettings, Surroundings, TrainingText
    from nbl_export.distill.training import distill
    from nbl_export.mixers import kind_of

    maps = {layer: kind_of(kind).from_tensors(tensors) for layer, (kind, tensors) in order["maps"].items()}
    text, settings = TrainingText(order["windows"], order["held"]), DistillSettings(**order["settings"])
    distill(model, maps, order["tap"], text, settings, Surroundings(peers=peers))


_WORK: dict[str, Callable[[Peers, Any, dict[str, Any]], None]] = {"calibrate": _calibrate, "distill": _distill}


@contextlib.contextmanager
def led(peers: Peers) -> Iterator[bool]:
    """Yield True on the leading process. On other processes, follow its orders first, then yield False."""
    if peers.rank:
        follow(peers)
        yield False
        return
    try:
        yield True
    finally:
        peers.close()
