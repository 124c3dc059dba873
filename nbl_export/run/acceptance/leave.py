"""What verification leaves in a run directory for the machine that will run the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.acceptance import gather, material
from nbl_export.errors import RefusalError
from nbl_export.graph.names import all_logits_file
from nbl_export.run.job import Job
from nbl_export.run_directory import ACCEPTANCE_FILE
from nbl_export.verify.ladder import ON_GPU

__all__ = ["leave"]

_ONE_LAYER_OF = "nbl"  # the subject whose first attention is built alone
_DIRECTORY = {"original": "original", "nbl": "model"}


def leave(job: Job, decoders: Mapping[str, Any], twins: Mapping[str, Path], out: Path) -> None:
    """Write acceptance.safetensors for engines that run on another machine; nothing for others.

    Args:
        decoders: verified decoders by subject, with the logits of all tokens.
        twins: float32 graphs by subject that these decoders run; empty unless the graphs have the static form.
        out: the directory that receives the file.
    """
    slots = job.slots
    ids = [int(i) for i in job.windows[1].flatten().tolist()]
    if not job.engine.capabilities.cross or min(slots, len(ids)) < gather.LEAST_TOKENS:
        return
    with job.ui.task("values for accept") as progress:
        texts = gather.choose_texts(ids, slots)
        said: dict[str, Any] = {}
        for number, (subject, decoder) in enumerate(decoders.items()):
            said |= gather.said_by(decoder, subject, texts)
            progress(number + 1, len(decoders) + 1)
        precision = job.options.precision
        limit = ON_GPU[precision].limit
        found = material.Material(precision, limit, slots if twins else 0, tuple(decoders), texts, said)
        if twins:
            found = dataclasses.replace(found, one=_one_layer(job, twins[_ONE_LAYER_OF], texts))
    material.save(found, out / ACCEPTANCE_FILE)


def _one_layer(job: Job, twin: Path, texts: material.Texts) -> material.OneLayer | None:
    """The shipped graph cut behind its first attention, and what its twin says; None if it cannot be cut."""
    from nbl_export.targets.tensorrt.static_form.first_attention import cut

    shipped = job.run.path / _DIRECTORY[_ONE_LAYER_OF]
    beside = twin.with_name("first_attention.onnx")  # external data must lie in the graph's directory
    try:
        beside.write_bytes(cut(twin))
        return gather.one_layer(_ONE_LAYER_OF, cut(shipped / all_logits_file(shipped)), beside, texts)
    except RefusalError as error:
        job.ui.say(f"  accept will test no single layer: {error}")
        return None
    finally:
        beside.unlink(missing_ok=True)
