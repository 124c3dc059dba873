"""A run directory and this machine's engines as JSON values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.records.decoder import DecoderSpec
from nbl_export.report.page import codes_of
from nbl_export.run_directory import MAPS_FILE, MOMENTS_FILE, RunDirectory
from nbl_export.targets import all_targets, load_engine

__all__ = ["describe", "examine_engines"]


def describe(directory: Path) -> dict[str, Any]:
    """Plan, stages, sizes and caches of a run directory.

    Raises:
        NblError: the directory is not a run directory.
    """
    facts = RunDirectory.existing(directory).manifest
    spec = DecoderSpec(**facts["decoder"])
    options = facts["options"]
    capabilities = load_engine(options["engine"], options.get("provider", "cpu")).capabilities
    itemsize = capabilities.cache_itemsize(options["precision"])
    kept = spec.num_layers - len(facts.get("replaced_layers", ()))
    return {
        "model": facts["model"],
        "decoder": facts["decoder"],
        "status": facts["status"],
        "precision": facts["options"]["precision"],
        "codes": codes_of(facts),
        "logits": facts.get("logits"),
        "replaced_layers": facts.get("replaced_layers"),
        "tap": facts.get("tap"),
        "token_table": facts.get("token_table"),
        "stages": {name: record["seconds"] for name, record in facts["stages"].items()},
        "variants": {
            "original": _variant(directory / "original", spec, spec.num_layers, itemsize),
            "nbl": _variant(directory / "model", spec, kept, itemsize),
        },
        "engines": facts.get("engines", {}),
        "files": {n: _size(directory / n) for n in (MOMENTS_FILE, MAPS_FILE, "checkpoint")},
        "scores": facts.get("scores", []),
        "command": facts["command"],
    }


def _variant(directory: Path, spec: DecoderSpec, kept: int, itemsize: int) -> dict[str, Any] | None:
    if not directory.is_dir():
        return None
    return {
        "path": str(directory),
        "cache_layers": kept,
        "kv_cache_bytes_per_token": spec.cache_bytes_per_token(kept, itemsize),
        "model_bytes": _size(directory),
    }


def _size(path: Path) -> int | None:
    if path.is_file():
        return path.stat().st_size
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else None


def examine_engines() -> dict[str, Any]:
    """Availability of every engine and provider, with the reason if one is not available."""
    found = {}
    for target in all_targets():
        about = target.capabilities
        own = about.provider == "cpu"
        answer = target.probe() if own else target.probe_run()
        name = about.name if own else f"{about.name} --provider {about.provider}"
        found[name] = {"title": about.title, "available": answer.available, "reason": answer.reason}
    return found
