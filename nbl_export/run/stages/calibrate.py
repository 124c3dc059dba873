"""The calibrate stage: sums of the calibration text. A killed run resumes from its partial file.

    windows ─► rows ─► batches ─► sums of a method ─► sums.safetensors
                                   └─ every half minute ─► calibrate.partial.safetensors

A model that does not fit into memory runs one layer at a time (`model.mapped`), and starts again after a kill. A
resumed run and an uninterrupted run give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, NblError
from nbl_export.methods import METHODS
from nbl_export.model import processes
from nbl_export.model.device import choose_device, describe_device, is_gpu
from nbl_export.options.options import CHECKPOINT_FIT, NO_ORIGINAL
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Skipped, StageContext, shared_batches
from nbl_export.run_directory import SUMS_FILE
from nbl_export.text.parts import rows_sha256

__all__ = ["CalibrateInputs", "declare", "run"]


@dataclass(frozen=True)
class CalibrateInputs:
    """What sums follow from.

    Attributes:
        windows: token windows that maps are fitted on.
        method: its name. collected: what its sums are of (`methods.base.Candidates`).
        shortage: why the model does not fit into memory, or "".
        device: of the torch model. asked_device: a value of `--device`.
    """

    fingerprint: str
    windows: Lazy[Any]
    method: str
    collected: Any
    compute_dtype: str
    spec: DecoderSpec
    model: Lazy[Any]
    checkpoint: Lazy[Path]
    shortage: Lazy[str]
    device: Lazy[Any]
    asked_device: Lazy[str]


def declare(job: Job) -> CalibrateInputs | Skipped:
    """The inputs of the stage; left out for an NBL checkpoint, which has its maps."""
    options = job.options
    if options.fit == CHECKPOINT_FIT:
        return Skipped(NO_ORIGINAL)
    return CalibrateInputs(
        fingerprint=job.fingerprint,
        windows=job.text.windows,
        method=options.method,
        collected=job.candidates.collected,
        compute_dtype=options.compute_dtype,
        spec=job.decoder,
        model=job.model,
        checkpoint=job.checkpoint,
        shortage=job.shortage,
        device=job.device,
        asked_device=Lazy(None, lambda: options.device),
    )


def run(inputs: CalibrateInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write the sums; returns the facts for the manifest.

    Raises:
        NblError: activations are not finite, or the method needs a model that fits into memory.
    """
    from nbl_export.methods.collector import batches
    from nbl_export.model import bfloat16
    from nbl_export.model.mapped import mapped_model

    method = METHODS[inputs.method]
    rows = method.rows(inputs.windows.value, inputs.collected)
    parts = batches(rows)
    device, why = _device(inputs)
    if why and method.instead:
        use = "start fewer processes, or " if processes.count() > 1 else ""
        raise NblError(f"{method.title} need the whole model in memory, and {why}; {use}{method.instead}")
    by_layer = processes.broadcast_str("by layer" if why else "")
    bf16 = bfloat16.use_bf16(inputs.compute_dtype, device)
    facts = _facts(inputs, rows, len(parts), bf16)
    identity = facts["identity"]
    if by_layer:
        ctx.ui.say(f"  one layer at a time{f' on {describe_device(device)}' if is_gpu(device) else ''}: {why}")
        sums = method.collector(mapped_model(inputs.checkpoint.value, device), inputs.collected, bf16=bf16)
        with ctx.ui.task(f"{rows.numel()} tokens, layer by layer") as progress, sums:
            sums.by_layer(rows, out / SUMS_FILE, facts, ctx.run.path, progress)
    else:
        _run_whole(inputs, ctx, rows, parts, facts, out)
    known = ctx.run.manifest["calibration"]
    calibration = {**known, "products": identity["products"], "device": describe_device(device)}
    return {"calibration": calibration, "sums": {name: identity[name] for name in ("method", "collected")}}


def _run_whole(
    inputs: CalibrateInputs, ctx: StageContext, rows: Any, parts: Sequence[Any], facts: dict[str, Any], out: Path
) -> None:
    """Collect with the whole model in memory."""
    partial = ctx.run.partial("calibrate")
    bf16 = facts["identity"]["products"] == "bfloat16"
    sums = METHODS[inputs.method].collector(inputs.model.value, inputs.collected, bf16=bf16)

    def keep(done: int, path: Path = partial) -> None:
        sums.meet()
        if processes.is_rank0():
            sums.save(path, {**facts, "done": done})

    with ctx.ui.task(f"{rows.numel()} tokens") as progress, sums:
        done = int(processes.broadcast_str(str(_restored(partial, facts, sums) if processes.is_rank0() else 0)))
        if done:
            ctx.ui.say(f"  resuming after {done} of {len(parts)} batches")
        sums.begin(rows)
        for batch in shared_batches(parts, done, progress, keep):
            sums.add(batch)
        keep(len(parts), out / SUMS_FILE)


def _device(inputs: CalibrateInputs) -> tuple[Any, str]:
    """The device, and why its memory or the machine's holds only one layer at a time, or ""."""
    from nbl_export.model.mapped import float32_bytes, layer_bytes

    spec = inputs.spec
    short = inputs.shortage.value
    checkpoint = inputs.checkpoint.value
    sums = METHODS[inputs.method].sums_bytes(inputs.collected, spec.hidden_size)
    if not short and is_gpu(inputs.device.value):
        weights = 0 if inputs.model.is_loaded else float32_bytes(checkpoint)
        if is_gpu(whole := choose_device(inputs.asked_device.value, weights + spec.num_layers * sums)):
            return whole, ""
    device = choose_device(inputs.asked_device.value, layer_bytes(checkpoint) + sums)
    if not short and not is_gpu(device):
        return inputs.device.value, ""
    return device, f"the weights are {short}" if short else "the GPU has too little memory for the weights and all sums"


def _facts(inputs: CalibrateInputs, rows: Any, batches: int, bf16: bool) -> dict[str, Any]:
    """The metadata of a file of sums except the count (`methods.sums_file`)."""
    identity = {
        "model": inputs.fingerprint,
        "tokens": int(rows.numel()),
        "rows": rows_sha256(rows),
        "batches": batches,
        "method": inputs.method,
        "collected": identity_of(inputs.collected),
        "products": "bfloat16" if bf16 else "float32",
    }
    return {"identity": identity, "done": batches}


def _restored(path: Path, facts: dict[str, Any], sums: Any) -> int:
    """Restore the sums of an unfinished run with the same inputs; return its number of batches, or 0."""
    from nbl_export.methods.sums_file import open_sums

    if not path.is_file():
        return 0
    try:
        file = open_sums(path, whole=False)
        if file.facts["identity"] != facts["identity"]:
            return 0
        file.check()
        sums.restore(file)
        return int(file.facts["done"])
    except CorruptError:
        return 0  # damaged: start again
