"""The calibrate stage: moments of the calibration text. A killed run resumes from its partial file.

    windows ─► batches ─► sums of every layer ─► moments.safetensors
                           └─ every half minute ─► calibrate.partial.safetensors

A job with an exit layer has sums of candidate exit layers in their place (`run.stages.exit`).

A model that does not fit into memory runs one layer at a time (`model.mapped`), and starts again after a kill. Sums are
exact (`sums`), so a resumed run and an uninterrupted run give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.model import processes
from nbl_export.model.device import chosen, is_gpu, spoken
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.run.job import Job
from nbl_export.run.stages import exit as exit_layer
from nbl_export.run.stages.common import Place, Skipped, shared_batches
from nbl_export.run_directory import MOMENTS_FILE
from nbl_export.text.parts import rows_sha256

__all__ = ["CalibrateInputs", "declare", "run", "taps_of"]


def taps_of(tap: str) -> tuple[str, ...]:
    """Taps to collect for a plan on `tap`; the bound always needs the residual tap."""
    return tuple(dict.fromkeys(("residual", tap)))


@dataclass(frozen=True)
class CalibrateInputs:
    """What moments follow from.

    Attributes:
        windows: token windows that maps are fitted on.
        shortage: why the model does not fit into memory, or "".
        device: of the torch model. asked_device: a value of `--device`.
    """

    fingerprint: str
    windows: Lazy[Any]
    tap: str
    compute_dtype: str
    spec: DecoderSpec
    model: Lazy[Any]
    checkpoint: Lazy[Path]
    shortage: Lazy[str]
    device: Lazy[Any]
    asked_device: Lazy[str]


def declare(job: Job) -> CalibrateInputs | exit_layer.ExitCalibration | Skipped:
    """The inputs of the stage; left out for an NBL checkpoint, which has its maps."""
    options = job.options
    if options.fit == CHECKPOINT_FIT:
        return Skipped(NO_ORIGINAL)
    if options.predicts:
        return exit_layer.calibration(job)
    return CalibrateInputs(
        fingerprint=job.fingerprint,
        windows=job.text.windows,
        tap=options.tap,
        compute_dtype=options.compute_dtype,
        spec=job.decoder,
        model=job.torch.model,
        checkpoint=job.torch.checkpoint,
        shortage=job.torch.shortage,
        device=job.torch.device,
        asked_device=Lazy(None, lambda: options.device),
    )


def run(inputs: CalibrateInputs | exit_layer.ExitCalibration, place: Place, out: Path) -> dict[str, Any]:
    """Write the moments, or the sums of candidate exit layers; returns the facts for the manifest.

    Raises:
        NblError: activations are not finite.
    """
    if isinstance(inputs, exit_layer.ExitCalibration):
        return exit_layer.collect(inputs, place, out)
    from nbl_export.methods.linear import collect
    from nbl_export.model import bfloat16

    parts = collect.batches(inputs.windows.value)
    device, why = _device(inputs)
    by_layer = processes.tell("by layer" if why else "")
    products = "bfloat16" if bfloat16.chosen(inputs.compute_dtype, device) else "float32"
    facts = _facts(inputs, len(parts), products)
    if by_layer:
        place.ui.say(f"  one layer at a time{f' on {spoken(device)}' if is_gpu(device) else ''}: {why}")
        _run_layers(inputs, place, facts, out, device)
    else:
        _run_whole(inputs, place, parts, facts, out)
    known = place.run.manifest["calibration"]
    return {"calibration": {**known, "products": products, "device": spoken(device)}}


def _run_whole(inputs: CalibrateInputs, place: Place, parts: Sequence[Any], facts: dict[str, Any], out: Path) -> None:
    """Collect with the whole model in memory."""
    from nbl_export.methods.linear import collect

    windows = inputs.windows.value
    partial = place.run.partial("calibrate")
    taps = facts["identity"]["taps"]
    narrow = facts["identity"]["products"] == "bfloat16"
    found = collect.Collection(inputs.model.value, taps, narrow=narrow)

    def keep(done: int, path: Path = partial) -> None:
        found.meet()
        if processes.leads():
            _write(found, path, {**facts, "done": done})

    with place.ui.task(f"{windows.numel()} tokens") as progress, found:
        done = int(processes.tell(str(_restored(partial, facts, found) if processes.leads() else 0)))
        if done:
            place.ui.say(f"  resuming after {done} of {len(parts)} batches")
        if done and processes.leads():
            found.share_references()
        else:
            found.refer(windows)
        for batch in shared_batches(parts, done, progress, keep):
            if batch is not None:
                found.add(batch)
        keep(len(parts), out / MOMENTS_FILE)


def _device(inputs: CalibrateInputs) -> tuple[Any, str]:
    """The device, and why its memory or the machine's holds only one layer at a time, or ""."""
    from nbl_export.methods.sums import sums_bytes
    from nbl_export.model.mapped import float32_bytes, layer_bytes

    spec = inputs.spec
    short = inputs.shortage.value
    checkpoint = inputs.checkpoint.value
    sums = len(taps_of(inputs.tap)) * sums_bytes(spec.hidden_size)
    if not short and is_gpu(inputs.device.value):
        weights = 0 if inputs.model.is_loaded else float32_bytes(checkpoint)
        if is_gpu(whole := chosen(inputs.asked_device.value, weights + spec.num_layers * sums)):
            return whole, ""
    device = chosen(inputs.asked_device.value, layer_bytes(checkpoint) + sums)
    if not short and not is_gpu(device):
        return inputs.device.value, ""
    return device, f"the weights are {short}" if short else "the GPU has too little memory for the weights and all sums"


def _run_layers(inputs: CalibrateInputs, place: Place, facts: dict[str, Any], out: Path, device: Any) -> None:
    """Collect with the weights and sums of one layer at a time in memory."""
    from nbl_export.methods.linear import collect
    from nbl_export.methods.sums_file import MomentsWriter
    from nbl_export.model.mapped import mapped_model

    windows = inputs.windows.value
    identity = facts["identity"]
    layers = inputs.spec.num_layers
    stated = {**facts, "count": windows.numel()}
    narrow = identity["products"] == "bfloat16"
    model = mapped_model(inputs.checkpoint.value, device)
    with (
        place.ui.task(f"{windows.numel()} tokens, layer by layer") as progress,
        collect.Collection(model, identity["taps"], narrow=narrow) as found,
        contextlib.ExitStack() as files,
    ):
        write = None
        if processes.leads():
            file = MomentsWriter(out / MOMENTS_FILE, stated, layers, found.taps, found.size)
            write = files.enter_context(file).write
        found.by_layer(windows, write, place.run.path, progress)


def _facts(inputs: CalibrateInputs, batches: int, products: str) -> dict[str, Any]:
    """The metadata of a moments file except the counts, see `moments_file`."""
    windows = inputs.windows.value
    identity = {
        "model": inputs.fingerprint,
        "tokens": int(windows.numel()),
        "windows": rows_sha256(windows),
        "batches": batches,
        "taps": list(taps_of(inputs.tap)),
        "products": products,
    }
    return {"identity": identity, "done": batches}


def _write(found: Any, path: Path, facts: dict[str, Any]) -> None:
    from nbl_export.methods.sums_file import MomentsWriter

    with MomentsWriter(path, {**facts, "count": found.count}, found.num_layers, found.taps, found.size) as file:
        for i in range(found.num_layers):
            file.write(found.layer(i))


def _restored(path: Path, facts: dict[str, Any], found: Any) -> int:
    """Restore the sums of an unfinished run with the same inputs; return its number of batches, or 0."""
    from nbl_export.methods.sums_file import open_moments

    if not path.is_file():
        return 0
    try:
        with open_moments(path, whole=False) as file:
            file.check()
            if file.facts["identity"] != facts["identity"]:
                return 0
            for i in range(file.num_layers):
                found.restore(i, {tap: file.sums(i, tap) for tap in file.taps})
            return int(file.facts["done"])
    except CorruptError:
        return 0  # damaged: start again
