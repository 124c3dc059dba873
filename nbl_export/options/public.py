"""Options with other paths than the user gave: absolute ones, and none.

recorded      Llama-3.2-1B, ../mails.txt:2
located       /home/ann/models/Llama-3.2-1B, /home/ann/texts/mails.txt:2    whatever the working directory is
public        Llama-3.2-1B, mails.txt:2
org/name, org/name@split stay as they are
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.options.options import JobOptions

__all__ = ["located", "public_facts", "public_options"]


def located(options: JobOptions, manifest: Mapping[str, Any]) -> JobOptions:
    """Options with the absolute paths of model and texts that a run's manifest has."""
    places = manifest.get("places") or {}
    noted = manifest.get("quantized") or {}
    same = options.quantized_model is not None and options.quantized_model == noted.get("name")
    return dataclasses.replace(
        options,
        model=places.get("model") or options.model,
        quantized_model=(noted.get("place") if same else None) or options.quantized_model,
        calibration=tuple(places.get("calibration") or options.calibration),
    )


def public_options(manifest: Mapping[str, Any]) -> JobOptions:
    """The options of a run's manifest, with file names where they had paths."""
    options = located(JobOptions.from_json(manifest["options"]), manifest)
    return dataclasses.replace(
        options,
        model=_last_part(options.model),
        quantized_model=options.quantized_model and _last_part(options.quantized_model),
        calibration=tuple(map(_last_part, options.calibration)),
    )


def public_facts(deployed: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The facts beside a deployed graph, with file names instead of paths.

    Args:
        deployed: nbl.json of the model directory.
        manifest: nbl.json of the run directory that holds the model directory.
    """
    options = public_options(manifest)
    written = {name: options.to_json()[name] for name in ("model", "quantized_model", "calibration")}
    return {
        **deployed,
        "model": {**deployed["model"], "name": options.model},
        "options": {**deployed["options"], **written},
    }


def _last_part(place: str) -> str:
    return Path(place).name if Path(place).is_absolute() else place
