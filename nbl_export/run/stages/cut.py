"""A job with a cut: sums of candidate cuts in the stage calibrate, and the choice among them in the stage plan.

windows ─► one pass of the model ─► sums of all candidate cuts ─► cuts.safetensors ─► `plan.cuts`
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
from nbl_export.mixers.cut import candidate_cuts
from nbl_export.mixers.predicted import Predicted
from nbl_export.model import processes
from nbl_export.options.goals import asked_increase
from nbl_export.options.options import AUTO_CUT
from nbl_export.plan.cuts import LENGTH, CutInputs, joined
from nbl_export.plan.inputs import Maps
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Place, shared_batches
from nbl_export.run_directory import CUTS_FILE
from nbl_export.text.parts import rows_sha256

__all__ = ["CutCalibration", "calibration", "choice", "collect", "saved_work"]


@dataclass(frozen=True)
class CutCalibration:
    """What the sums of candidate cuts follow from.

    Attributes:
        cuts: the candidates. length: tokens of a row, which joins windows.
    """

    fingerprint: str
    windows: Lazy[Any]
    cuts: tuple[int, ...]
    length: int
    compute_dtype: str
    model: Lazy[Any]
    shortage: Lazy[str]


def calibration(job: Job) -> CutCalibration:
    """The inputs of the stage calibrate."""
    return CutCalibration(
        fingerprint=job.fingerprint,
        windows=job.text.windows,
        cuts=_cuts(job),
        length=_length(job),
        compute_dtype=job.options.compute_dtype,
        model=job.torch.model,
        shortage=job.torch.shortage,
    )


def _cuts(job: Job) -> tuple[int, ...]:
    """All candidates, or the named cut; what the run has sums of already stays."""
    asked = job.options.cut
    known = job.run.manifest.get("calibrated_cuts") or ()
    if asked != AUTO_CUT and int(asked) in known:
        return tuple(known)
    return candidate_cuts(job.decoder.num_layers) if asked == AUTO_CUT else (int(asked),)


def _length(job: Job) -> int:
    return min(LENGTH, job.decoder.max_positions)


def collect(inputs: CutCalibration, place: Place, out: Path) -> dict[str, Any]:
    """Write cuts.safetensors; returns the facts for the manifest.

    Raises:
        NblError: the model does not fit into memory, or activations are not finite.
    """
    from nbl_export.calibrate.collect import batches, run_batch
    from nbl_export.calibrate.cuts import CutSums
    from nbl_export.model import bfloat16
    from nbl_export.model.device import spoken

    if inputs.shortage.value:
        use = "start fewer processes, or " if processes.count() > 1 else ""
        raise NblError(
            f"predicted keys need the whole model in memory, and its weights are {inputs.shortage.value}; "
            f"{use}replace layers in its place (--cut none)"
        )
    model = inputs.model.value
    rows = joined(inputs.windows.value, inputs.length)
    narrow = bfloat16.chosen(inputs.compute_dtype, model.device)
    facts = {"model": inputs.fingerprint, "windows": rows_sha256(rows), "cuts": list(inputs.cuts), "narrow": narrow}
    partial = place.run.partial("calibrate")
    parts = batches(rows)
    restored = _restored(partial, facts, model.device) if processes.leads() else None
    sums, done = restored or (CutSums.of(model, inputs.cuts), 0)
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
        keep(len(parts), out / CUTS_FILE)
    products = "bfloat16" if narrow else "float32"
    calibration = {**place.run.manifest["calibration"], "products": products, "device": spoken(model.device)}
    return {"calibration": calibration, "calibrated_cuts": list(inputs.cuts)}


def _restored(path: Path, facts: dict[str, Any], device: Any) -> tuple[Any, int] | None:
    """The sums of an unfinished run with the same inputs, and their number of batches; None if there are none."""
    from nbl_export.calibrate.cuts import load

    if not path.is_file():
        return None
    try:
        found, noted = load(path, device)
    except CorruptError:
        return None
    done = int(noted.pop("done", 0))
    return (found, done) if noted == facts else None


# -- plan ------------------------------------------------------------------------------------------------------


def choice(job: Job) -> CutInputs:
    """The inputs of the stage plan."""
    options = job.options
    named = job.options.cut != AUTO_CUT
    setting = {"engine": options.engine, "precision": options.precision, "tokens": options.prompt_length}
    return CutInputs(
        num_layers=job.decoder.num_layers,
        cuts=(int(options.cut),) if named else _cuts(job),
        nears=tuple(n for n in options.nears if n < job.decoder.max_positions),
        named=named,
        share=asked_increase(options),
        asked=options.max_perplexity_increase,
        length=_length(job),
        maps=Lazy(job.files_of("calibrate"), lambda: _maps(job)),
        mixes=job.torch.mixes,
        choosing=job.choosing,
        deciding=job.text.deciding,
        saved=Lazy(options.kept_logits, lambda: saved_work(job)),
        speedup=Lazy(None, lambda: job.cost.value.speedup),
        setting=Lazy(None, lambda: setting),
    )


def _maps(job: Job) -> Callable[[int, int], Maps]:
    """A cut and a number of near tokens -> the maps of all layers from the cut up."""
    from nbl_export.calibrate import cuts

    sums, _ = cuts.load(job.run.path / CUTS_FILE)

    @functools.cache
    def fitted(cut: int) -> dict[int, Predicted]:
        return cuts.maps_of(job.torch.model.value, sums, cut, 1)

    return lambda cut, near: {i: dataclasses.replace(mixer, near=near) for i, mixer in fitted(cut).items()}


def saved_work(job: Job) -> Callable[[Maps, int], float]:
    """Maps and the tokens of a prompt -> the share of its arithmetic that these maps save."""
    costs = job.cost.value
    return lambda maps, tokens: dataclasses.replace(costs, tokens=tokens).prefill_saved(map_sizes(maps))
