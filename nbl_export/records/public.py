"""Options and facts of a run that can be published: without paths of the machine that ran it.

/home/ann/models/Llama-3.2-1B      ->  Llama-3.2-1B
/home/ann/texts/mails.txt:2        ->  mails.txt:2
org/name, org/name@split           ->  as they are
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.records.options import JobOptions

__all__ = ["public_facts", "public_options"]


def public_options(manifest: Mapping[str, Any]) -> JobOptions:
    """The options of a run directory's manifest, with file names where they had paths."""
    options = JobOptions.from_json(manifest["options"])
    places = manifest.get("places", {})  # absolute paths, unlike hub ids
    texts = places.get("calibration") or options.calibration
    quantized = (manifest.get("quantized") or {}).get("place") or options.quantized_model
    return dataclasses.replace(
        options,
        model=_last_part(places.get("model") or options.model),
        quantized_model=quantized and options.quantized_model and _last_part(quantized),
        calibration=tuple(_last_part(source) for source in texts),
    )


def public_facts(deployed: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts beside a deployed graph, with file names instead of paths.

    Args:
        deployed: nbl.json of the model directory.
        manifest: nbl.json of the run directory that holds the model directory.
    """
    options = public_options(manifest)
    written = {
        "model": options.model,
        "quantized_model": options.quantized_model,
        "calibration": list(options.calibration),
    }
    return {
        **deployed,
        "model": {**deployed["model"], "name": options.model},
        "options": {**deployed["options"], **written},
    }


def _last_part(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place
