"""A job with an exit layer: sums of candidate exit layers in the stage calibrate, and the choice among them in the
stage plan.

windows ─► one pass of the model ─► sums of all candidate exit layers ─► cuts.safetensors ─►
`methods.predicted_kv.candidates`
            └─ every half minute ─► calibrate.partial.safetensors
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.measure.cost import map_sizes
from nbl_export.methods.inputs import Maps
from nbl_export.methods.predicted_kv.candidates import LENGTH, ExitInputs, joined
from nbl_export.methods.predicted_kv.maps import PredictedKV
from nbl_export.methods.predicted_kv.prompt_exit import candidate_exits
from nbl_export.model import processes
from nbl_export.options.goals import asked_increase
from nbl_export.options.options import AUTO_EXIT
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Place, shared_batches
from nbl_export.run_directory import EXIT_SUMS_FILE
from nbl_export.text.parts import rows_sha256

__all__ = ["ExitCalibration", "calibration", "choice", "collect", "saved_work"]


@dataclass(frozen=True)
class ExitCalibration:
    """What the sums of candidate exit layers follow from.

    Attributes:
        exits: the candidates. length: tokens of a row, which joins windows.
    """

    fingerprint: str
    windows: Lazy[Any]
    exits: tuple[int, ...]
    length: int
    compute_dtype: str
    model: Lazy[Any]
    shortage: Lazy[str]


def calibration(job: Job) -> ExitCalibration:
    """The inputs of the stage calibrate."""
    return ExitCalibration(
        fingerprint=job.fingerprint,
        windows=job.text.windows,
        exits=_candidates(job),
        length=_length(job),
        compute_dtype=job.options.compute_dtype,
        model=job.torch.model,
        shortage=job.torch.shortage,
    )


def _candidates(job: Job) -> tuple[int, ...]:
    """All candidates, or the named exit layer; what the run has sums of already stays."""
    asked = job.options.exit_layer
    known = job.run.manifest.get("calibrated_exits") or ()
    if asked != AUTO_EXIT and int(asked) in known:
        return tuple(known)
    return candidate_exits(job.decoder.num_layers) if asked == AUTO_EXIT else (int(asked),)


def _length(job: Job) -> int:
    return min(LENGTH, job.decoder.max_positions)


def collect(inputs: ExitCalibration, place: Place, out: Path) -> dict[str, Any]:
    """Write cuts.safetensors; returns the facts for the manifest.

    Raises:
        NblError: the model does not fit into memory, or activations are not finite.
    """
    from nbl_export.methods.linear.collect import batches, run_batch
    from nbl_export.methods.predicted_kv.sums import ExitSums
    from nbl_export.model import bfloat16
    from nbl_export.model.device import spoken

    if inputs.shortage.value:
        use = "start fewer processes, or " if processes.count() > 1 else ""
        raise NblError(
            f"predicted KV need the whole model in memory, and its weights are {inputs.shortage.value}; "
            f"{use}replace layers in its place (--exit-layer none)"
        )
    model = inputs.model.value
    rows = joined(inputs.windows.value, inputs.length)
    narrow = bfloat16.chosen(inputs.compute_dtype, model.device)
    facts = {"model": inputs.fingerprint, "windows": rows_sha256(rows), "exits": list(inputs.exits), "narrow": narrow}
    partial = place.run.partial("calibrate")
    parts = batches(rows)
    restored = _restored(partial, facts, model.device) if processes.leads() else None
    sums, done = restored or (ExitSums.of(model, inputs.exits), 0)
    done = int(processes.tell(str(done)))
    sums.share_references()
    if done:
        place.ui.say(f"  resuming after {done} of {len(parts)} batches")

    def keep(done: int, path: Path = partial) -> None:
        if processes.leads():
            sums.save(path, {**facts, "done": done})

    with place.ui.task(f"{rows.numel()} tokens") as progress, sums.attached(model):
        for batch in shared_batches(parts, done, progress, keep):
            sums.idle = batch is None
            run_batch(model, parts[0] if batch is None else batch, narrow=narrow)
        keep(len(parts), out / EXIT_SUMS_FILE)
    products = "bfloat16" if narrow else "float32"
    calibration = {**place.run.manifest["calibration"], "products": products, "device": spoken(model.device)}
    return {"calibration": calibration, "calibrated_exits": list(inputs.exits)}


def _restored(path: Path, facts: dict[str, Any], device: Any) -> tuple[Any, int] | None:
    """The sums of an unfinished run with the same inputs, and their number of batches; None if there are none."""
    from nbl_export.methods.predicted_kv.sums import load

    if not path.is_file():
        return None
    try:
        found, noted = load(path, device)
    except CorruptError:
        return None
    done = int(noted.pop("done", 0))
    return (found, done) if noted == facts else None


# -- plan ------------------------------------------------------------------------------------------------------


def choice(job: Job) -> ExitInputs:
    """The inputs of the stage plan."""
    options = job.options
    named = job.options.exit_layer != AUTO_EXIT
    setting = {"engine": options.engine, "precision": options.precision, "tokens": options.prompt_length}
    return ExitInputs(
        num_layers=job.decoder.num_layers,
        exits=(int(options.exit_layer),) if named else _candidates(job),
        recent_choices=tuple(n for n in options.recent_choices if n < job.decoder.max_positions),
        named=named,
        share=asked_increase(options),
        asked=options.max_perplexity_increase,
        length=_length(job),
        maps=Lazy(job.files_of("calibrate"), lambda: _maps(job)),
        partial=job.torch.partial,
        selection=job.selection,
        validation=job.text.validation,
        saved=Lazy(options.kept_logits, lambda: saved_work(job)),
        speedup=Lazy(None, lambda: job.cost.value.speedup),
        setting=Lazy(None, lambda: setting),
    )


def _maps(job: Job) -> Callable[[int, int], Maps]:
    """An exit layer and a number of recent tokens -> the maps of all layers from the exit layer up."""
    from nbl_export.methods.predicted_kv import sums as exits

    sums, _ = exits.load(job.run.path / EXIT_SUMS_FILE)

    @functools.cache
    def fitted(exit_layer: int) -> dict[int, PredictedKV]:
        return exits.maps_of(job.torch.model.value, sums, exit_layer, 1)

    return lambda exit_layer, recent_tokens: {
        i: dataclasses.replace(mixer, recent_tokens=recent_tokens) for i, mixer in fitted(exit_layer).items()
    }


def saved_work(job: Job) -> Callable[[Maps, int], float]:
    """Maps and the tokens of a prompt -> the share of its arithmetic that these maps save."""
    costs = job.cost.value
    return lambda maps, tokens: dataclasses.replace(costs, tokens=tokens).prefill_saved(map_sizes(maps))
