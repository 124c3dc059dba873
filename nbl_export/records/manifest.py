"""Checks the values of a run's manifest that stages rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.from_json import read_record
from nbl_export.records.options import JobOptions, describe_command
from nbl_export.records.plan import LayerScore, Plan

__all__ = ["check_manifest", "command_of"]


def check_manifest(manifest: Any) -> None:
    """Check all values that stages rely on.

    Raises:
        KeyError, TypeError, ValueError, AttributeError or OverflowError: a value is missing or of the wrong kind.
    """
    _require(manifest, schema=int, status=str, command=str, stages=dict)
    _require(manifest["model"], name=str, fingerprint=str)
    _require(manifest["calibration"], name=str, sha256=str)
    for facts in {"hub": {}, **manifest["calibration"]}["hub"].values():
        _require(facts, sha256=str, characters=int, cut=bool)
    for record in manifest["stages"].values():
        _require(record, key=str, seconds=(int, float), files=dict)
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in record["files"]):
            raise ValueError("a stage names a file outside the run")
    _require(manifest["options"], model=str, engine=str, precision=str)
    JobOptions.from_json(manifest["options"])
    spec = read_record(DecoderSpec, manifest["decoder"])
    places = manifest.get("places", {})
    _require({"model": None, **places}, model=(str, type(None)))
    if manifest["options"].get("quantized_model") is not None:
        _require(manifest["quantized"], name=str, fingerprint=str, place=(str, type(None)))
    _require({"logits": None, **manifest}, logits=(str, type(None)))
    texts = places.get("calibration", [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("'places' is of the wrong kind")
    if "plan" in manifest["stages"]:
        for score in manifest["scores"]:
            read_record(LayerScore, score)
        plan = {"replaced": manifest["replaced_layers"], "tap": manifest["tap"], "select": manifest["select"]}
        read_record(Plan, {"num_layers": spec.num_layers, **plan})
    _check_curve(manifest.get("curve"))
    if manifest.get("goal") is not None:
        _require({"max_perplexity_increase": "", "default": False, **manifest["goal"]},
                 max_perplexity_increase=str, default=bool)  # fmt: skip


def command_of(manifest: dict[str, Any], output: Path) -> str:
    """The command that goes on with a run, from checked options; `command` in a file may be a stranger's advice."""
    return describe_command(JobOptions.from_json(manifest["options"]), output)


def _check_curve(curve: Any) -> None:
    if curve is None:
        return
    _require({"engine": "", "precision": "", **curve}, texts=list, engine=str, precision=str, tokens=int, points=list)
    number = (int, float)
    for point in curve["points"]:
        _require(point, layers=int, replaced_layers=list, increases=list, prefill=number, decode=number)
        if len(point["increases"]) != len(curve["texts"]):
            raise ValueError("'curve' has not one increase for each text")
        for share in point["increases"]:
            _require({"increases": share}, increases=number)
    for text in curve["texts"]:
        _require({"texts": text}, texts=str)


def _require(values: dict[str, Any], **kinds: Any) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            raise TypeError(f"{name!r} is of the wrong kind")
