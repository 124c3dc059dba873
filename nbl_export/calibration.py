"""The calibrate stage of a job: its part of the text -> moments.safetensors, going on where a kill left it.

    windows ─► batches ─► those of this shard ─► sums of every layer ─► moments.safetensors
                                                  └─ every half minute ─► calibrate.partial.safetensors

Since sums are exact (`sums`), a run that went on from a partial file ends with the same bytes as one that ran through.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.job import OF_CALIBRATE, Job
from nbl_export.shards import parse_shard

__all__ = ["run", "taps_of"]

_SECONDS = 30.0  # between two partial files
_SHARE = 50.0  # and this many times what writing one took


def taps_of(tap: str) -> tuple[str, ...]:
    """Taps to collect for a plan on `tap`: the bound needs the residual one in any case."""
    return tuple(dict.fromkeys(("residual", tap)))


def run(job: Job, out: Path) -> dict[str, Any]:
    """Write out/moments.safetensors; returns the facts for the manifest."""
    from nbl_export import calibrate, distributed

    windows, _ = job.windows
    parts = calibrate.batches(windows)
    chosen = parse_shard(job.options.shard).batches(len(parts))
    mine = [parts[k] for k in chosen]
    calibration = {**job.run.manifest["calibration"], "tokens": int(windows.numel()), "context": job.options.context}
    facts = _facts(job, windows, len(parts), len(mine), calibration)
    partial = _Partial(job.run.partial("calibrate"), facts)
    total = sum(part.numel() for part in mine)
    taps, peers = facts["identity"]["taps"], distributed.current()
    with job.ui.task(f"{total} tokens") as progress, calibrate.Collection(peers.place(job.model), taps) as found:
        done = partial.restore(found)
        if done:
            job.ui.say(f"  going on after {done} of {len(mine)} batches")
        else:
            found.refer(windows)
        order = {"checkpoint": str(job.checkpoint.absolute()), "windows": windows, "batches": chosen, "done": done}
        peers.lead({**order, "taps": taps})
        peers.agree(None)
        peers.share_reference(found)

        def is_due() -> bool:
            progress(found.count * peers.size if peers.size > 1 else found.count, total)
            return partial.is_due()

        distributed.collect_batches(peers, found, mine, done, is_due, lambda end: partial.save(found, end))
        _write(found, out / "moments.safetensors", facts)
    return {"calibration": calibration}


def _facts(job: Job, windows: Any, batches: int, mine: int, calibration: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a moments file, but for what is counted: see `moments_file`."""
    shard = parse_shard(job.options.shard)
    manifest = job.run.manifest
    identity = {
        "model": job.fingerprint,
        "text": job.text_sha256,
        "context": job.options.context,
        "tokens": int(windows.numel()),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        "batches": batches,
        "taps": list(taps_of(job.options.tap)),
    }
    about = {name: manifest[name] for name in ("model", "decoder", "places", "num_layers")}
    chosen = {name: value for name, value in job.options.to_json().items() if name in ("model", *OF_CALIBRATE)}
    return {
        "identity": identity,
        "shard": [shard.number, shard.of],
        "batches": mine,
        "done": mine,
        "run": {**about, "options": chosen, "calibration": calibration},
    }


def _write(found: Any, path: Path, facts: dict[str, Any]) -> None:
    from nbl_export.moments_file import MomentsWriter

    with MomentsWriter(path, {**facts, "count": found.count}, found.num_layers, found.taps, found.size) as file:
        for i in range(found.num_layers):
            file.write(found.layer(i))


class _Partial:
    """The unfinished sums of a run, on disk."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._due = time.monotonic() + _SECONDS

    def restore(self, found: Any) -> int:
        """Bring back what a run of the same inputs left. Returns the batches that are in it: 0 if there is nothing."""
        from nbl_export.moments_file import open_moments

        if not self._path.is_file():
            return 0
        try:
            with open_moments(self._path) as file:
                file.check()
                if self._identity(file.facts) != self._identity(self._facts):
                    return 0
                for i in range(file.num_layers):
                    found.restore(i, {tap: file.sums(i, tap) for tap in file.taps})
                return int(file.facts["done"])
        except CorruptError:
            return 0  # half of what it was; begin again

    @staticmethod
    def _identity(facts: dict[str, Any]) -> tuple[Any, ...]:
        return facts["identity"], list(facts["shard"]), facts["batches"]

    def is_due(self) -> bool:
        return time.monotonic() >= self._due

    def save(self, found: Any, done: int) -> None:
        started = time.monotonic()
        _write(found, self._path, {**self._facts, "done": done})
        self._due = time.monotonic() + max(_SECONDS, _SHARE * (time.monotonic() - started))
