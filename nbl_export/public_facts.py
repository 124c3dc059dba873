"""What of a run is fit to be published: its options and facts without the places of the machine that made it.

/home/ann/models/Llama-3.2-1B      ->  Llama-3.2-1B
/home/ann/texts/mails.txt:2        ->  mails.txt:2
org/name, org/name@split           ->  as they are
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.records import JobOptions

__all__ = ["codes_of", "public_facts", "public_options"]


def codes_of(manifest: Mapping[str, Any]) -> str | None:
    """Whose codes an int4 graph has: "gptq codes of NAME in groups of 128"; None where the builder quantised."""
    if not manifest["options"].get("quantized_model"):
        return None
    noted = manifest["quantized"]
    return f"{noted['method']} codes of {noted['title']} in groups of {noted['group_size']}"


def public_options(manifest: Mapping[str, Any]) -> JobOptions:
    """The options of a run directory's manifest, with file names where they had paths."""
    options = JobOptions.from_json(manifest["options"])
    places = manifest.get("places", {})  # paths from the root, so that a hub id is told from a path
    texts = places.get("calibration") or options.calibration
    quantized = (manifest.get("quantized") or {}).get("place") or options.quantized_model
    return dataclasses.replace(
        options,
        model=_last_part(places.get("model") or options.model),
        quantized_model=quantized and options.quantized_model and _last_part(quantized),
        calibration=tuple(_last_part(source) for source in ((texts,) if isinstance(texts, str) else texts)),
    )


def public_facts(deployed: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The same for the facts that lie beside a deployed graph.

    Args:
        deployed: nbl.json of the model directory.
        manifest: nbl.json of the run directory that it is in.
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
