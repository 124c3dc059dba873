"""The calibrate stage: moments of the calibration text. A killed run resumes from its partial file.

    windows ─► batches ─► sums of every layer ─► moments.safetensors
                           └─ every half minute ─► calibrate.partial.safetensors

A model that does not fit into memory runs one layer at a time (`one_layer`), and starts again after a kill. Sums are
exact (`sums`), so a resumed run and an uninterrupted run give the same bytes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.mixers import kind_of
from nbl_export.run.job import Job
from nbl_export.run_directory import MOMENTS_FILE

__all__ = ["run", "taps_of"]

_SECONDS = 30.0  # least time between two partial files,
_SHARE = 50.0  # and at least this many times the seconds of writing one


def taps_of(tap: str) -> tuple[str, ...]:
    """Taps to collect for a plan on `tap`; the bound always needs the residual tap."""
    return tuple(dict.fromkeys(("residual", tap)))


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write out/moments.safetensors; returns the facts for the manifest.

    Raises:
        NblError: activations are not finite.
    """
    from nbl_export.calibrate import hooks

    windows, _ = job.windows
    parts = hooks.batches(windows)
    calibration = {
        **job.run.manifest["calibration"], "tokens": int(windows.numel()), "context": job.options.context,
        "products": _products(job),
    }  # fmt: skip
    facts = _facts(job, windows, len(parts), calibration["products"])
    if _by_layer(job):
        _run_layers(job, windows, parts, facts, out)
    else:
        _run_whole(job, windows, parts, facts, out)
    return {"calibration": calibration}


def _run_whole(job: Job, windows: Any, parts: Sequence[Any], facts: dict[str, Any], out: Path) -> None:
    """Collect with the whole model in memory, on one process or several."""
    from nbl_export.parallel import peers as distributed

    partial = _Partial(job.run.partial("calibrate"), facts)
    total = windows.numel()
    taps, peers, narrow = facts["identity"]["taps"], distributed.current(), facts["identity"]["products"] == "bfloat16"
    with job.ui.task(f"{total} tokens") as progress, _collection(job, taps, narrow) as found:
        done = partial.restore(found)
        if done:
            job.ui.say(f"  resuming after {done} of {len(parts)} batches")
        else:
            found.refer(windows)
        order = {"checkpoint": str(job.checkpoint.absolute()), "windows": windows, "done": done}
        peers.lead({"work": "calibrate", **order, "taps": taps, "kind": job.options.kind, "narrow": narrow})
        peers.agree(None)
        peers.share_reference(found)

        def is_due() -> bool:
            progress(min(total, found.count * peers.size), total)
            return partial.is_due()

        distributed.collect_batches(peers, found, parts, done, is_due, lambda end: partial.save(found, end))
        peers.done()
        _write(found, out / MOMENTS_FILE, facts)


def _products(job: Job) -> str:
    """Type of the model's products. All processes of a job follow process 0."""
    from nbl_export.model import bfloat16
    from nbl_export.parallel import peers as distributed

    narrow = job.graph is None and bfloat16.chosen(job.options.compute_dtype, distributed.current().device)
    return "bfloat16" if narrow else "float32"


def _collection(job: Job, taps: list[str], narrow: bool) -> Any:
    """Accumulators on the torch model, or on the graph if the model is only a graph.

    Raises:
        NblError: the model is a graph, and torchrun started several processes.
    """
    from nbl_export.calibrate import hooks
    from nbl_export.parallel import peers as distributed

    peers = distributed.current()
    if job.graph is None:
        return hooks.Collection(peers.place(job.model), taps, kind_of(job.options.kind), narrow=narrow)
    from nbl_export.calibrate.from_graph import GraphCollection

    if peers.size > 1:
        raise NblError("torchrun is for torch models; calibrate a graph with one process")
    return GraphCollection(job.graph, job.spec, taps, kind_of(job.options.kind))


def _by_layer(job: Job) -> bool:
    """Whether memory holds only one layer at a time; tells the user if so."""
    from nbl_export.parallel import peers as distributed

    if not job.shortage or distributed.current().size > 1:
        return False
    job.ui.say(f"  one layer at a time: the weights are {job.shortage}")
    return True


def _run_layers(job: Job, windows: Any, parts: Sequence[Any], facts: dict[str, Any], out: Path) -> None:
    from nbl_export.calibrate import layer_by_layer
    from nbl_export.calibrate.moments_file import MomentsWriter

    count, identity = windows.numel(), facts["identity"]
    target, spec, kind = out / MOMENTS_FILE, job.spec, kind_of(job.options.kind)
    wanted = layer_by_layer.Wanted(identity["taps"], kind, identity["products"] == "bfloat16")
    sizes = (kind.feature_count(spec.hidden_size), spec.hidden_size)
    with (
        job.run.scratch() as scratch,
        job.ui.task(f"{count} tokens, layer by layer") as progress,
        MomentsWriter(target, {**facts, "count": count}, spec.num_layers, wanted.taps, sizes) as file,
    ):
        layers = layer_by_layer.collect_layers(
            job.checkpoint,
            windows,
            parts,
            wanted,
            scratch,
            progress,
        )
        for sums in layers:
            file.write(sums)


def _facts(job: Job, windows: Any, batches: int, products: str) -> dict[str, Any]:
    """The metadata of a moments file except the counts, see `moments_file`."""
    identity = {
        "model": job.fingerprint,
        "text": job.text_sha256,
        "context": job.options.context,
        "tokens": int(windows.numel()),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "batches": batches,
        "taps": list(taps_of(job.options.tap)),
        "products": products,
    }
    return {"identity": identity, "done": batches}


def _write(found: Any, path: Path, facts: dict[str, Any]) -> None:
    from nbl_export.calibrate.moments_file import MomentsWriter

    with MomentsWriter(path, {**facts, "count": found.count}, found.num_layers, found.taps, found.sizes) as file:
        for i in range(found.num_layers):
            file.write(found.layer(i))


class _Partial:
    """The unfinished sums of a run, on disk."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._due = time.monotonic() + _SECONDS

    def restore(self, found: Any) -> int:
        """Restore the sums of an unfinished run with the same inputs; return its number of batches, or 0."""
        from nbl_export.calibrate.moments_file import open_moments

        if not self._path.is_file():
            return 0
        try:
            with open_moments(self._path) as file:
                file.check()
                if file.facts["identity"] != self._facts["identity"]:
                    return 0
                for i in range(file.num_layers):
                    found.restore(i, {tap: file.sums(i, tap) for tap in file.taps})
                return int(file.facts["done"])
        except CorruptError:
            return 0  # damaged: start again

    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def save(self, found: Any, done: int) -> None:
        started = time.monotonic()
        _write(found, self._path, {**self._facts, "done": done})
        self._due = time.monotonic() + max(_SECONDS, _SHARE * (time.monotonic() - started))
