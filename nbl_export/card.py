"""The model card: README.md of a model folder, as the hub shows it.

    report.json, report.md, nbl.json, the base model's card ─► card.md.jinja ─► DIR/model/README.md

Tables of speed and price are the report's own, so that card and report cannot disagree. The manifest notes what was
written and from which report: an edited card is never overwritten, and `push` sees a card that the run has outgrown.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export import base_model
from nbl_export.artifacts import RunDirectory, file_sha256, friendly_os_errors
from nbl_export.base_model import BaseModel
from nbl_export.engines import load_engine
from nbl_export.engines.providers import PROVIDERS
from nbl_export.errors import MissingPackageError, NblError
from nbl_export.job import describe_command
from nbl_export.public_facts import public_options

__all__ = ["CARD", "check_publishable", "is_stale", "render", "write_card"]

CARD = "model/README.md"
_CPU_PACKAGES = ("onnxruntime", "onnxruntime-genai")
_SECTIONS = ("Speed", "Price in quality")
_TAGS = ["onnx", "onnxruntime", "onnxruntime-genai", "neural-block-linearization", "text-generation"]


def write_card(directory: Path, hub_id: str | None = None, *, force: bool = False) -> Path:
    """Write DIR/model/README.md from a finished run.

    Args:
        hub_id: of the base model, where the run was made from files.
        force: also of a run that failed verification, and over a card that was edited.

    Raises:
        NblError: the run is not finished or failed, it is of a compiled engine, or the card was edited.
        CorruptError: a file of the run is missing or not what was written there.
    """
    if hub_id is not None:
        base_model.check_hub_id(hub_id, "--base-model")
    with RunDirectory.open_run(directory, create=False) as run:
        check_publishable(run, force=force)
        target = run.path / CARD
        if not force and _is_edited(run, target):
            raise NblError(f"{target} is not as nbl-export wrote it; move it away, or use --force to replace it")
        page = (run.path / "report.md").read_text(encoding="utf-8")
        base = base_model.find(run.manifest, hub_id)
        text = render(run.manifest, run.read_json("report.json"), page, base, chat=_has_template(run.path / "model"))
        with friendly_os_errors(target), run.scratch() as scratch:
            (scratch / "README.md").write_text(text, encoding="utf-8")
            os.replace(scratch / "README.md", target)
        run.save(card={"sha256": file_sha256(target), "report": file_sha256(run.path / "report.json")})
        return target


def check_publishable(run: RunDirectory, *, force: bool) -> None:
    """Refuse what should not go out: unfinished, failed (unless `force`), damaged, or bound to one machine.

    Raises:
        NblError, CorruptError: with the reason.
    """
    options = run.manifest["options"]
    if load_engine(options["engine"], options.get("provider", "cpu")).CAPABILITIES.static:
        raise NblError(
            f"{run.path} is for engine {options['engine']}, whose result belongs to the machine it was compiled for; "
            "publish a run of --engine ort"
        )
    missing = [stage for stage in ("rewrite", "verify", "report") if stage not in run.stages]
    if missing:
        raise NblError(f"{run.path} is not finished: run its command again ({run.manifest['command']})")
    if run.manifest["status"] != "verified" and not force:
        raise NblError(f"{run.path} failed verification; see its verify.json, or use --force to go on all the same")
    for stage in ("rewrite", "verify", "report"):
        run.check(stage)


def _has_template(model: Path) -> bool:
    if (model / "chat_template.jinja").is_file():
        return True
    settings = model / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))


def _is_edited(run: RunDirectory, card: Path) -> bool:
    return card.exists() and file_sha256(card) != run.manifest.get("card", {}).get("sha256")


def is_stale(run: RunDirectory) -> bool:
    """Whether the card was written from another report than the run has now."""
    return run.manifest.get("card", {}).get("report") != file_sha256(run.path / "report.json")


def render(
    manifest: Mapping[str, Any], report: Mapping[str, Any], page: str, base: BaseModel, *, chat: bool = False
) -> str:
    """The text of the card; the same input gives the same bytes.

    Args:
        manifest: nbl.json of the run directory.
        report: the value of report.json.
        page: report.md.
        base: what is known of the base model.
        chat: the model folder has a chat template, which the programs then use.

    Raises:
        NblError: report.md has not the sections that it should have.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError as error:
        raise MissingPackageError("huggingface_hub", "export", "writing a model card") from error
    data = ModelCardData(
        base_model=base.hub_id,
        license=base.licence,
        license_name=base.licence_name,
        license_link=base.licence_link,
        language=list(base.languages) or None,
        pipeline_tag="text-generation",
        tags=_TAGS,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(manifest, report, page, base, chat)}")
    return str(card)


def _body(manifest: Mapping[str, Any], report: Mapping[str, Any], page: str, base: BaseModel, chat: bool) -> str:
    import jinja2

    source = importlib.resources.files("nbl_export").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["text"] = _escaped
    options = public_options(manifest)
    provider = PROVIDERS.get(options.provider)  # None for the CPU
    packages = provider.packages if provider else _CPU_PACKAGES
    memory = (report["machine"] or {}).get("memory_bytes")
    return environment.from_string(source).render(
        base=base,
        chat=chat,
        report=report,
        decoder=manifest["decoder"],
        method=report["method"] or "nbl",
        distilled=manifest.get("fit", {}).get("kind") == "distilled",
        parts=_parts(page),
        genai_packages=" ".join(packages),
        onnxruntime_package=packages[0],
        library=bool(provider and provider.registered),
        memory="–" if memory is None else f"{memory / 2**30:.1f} GiB",
        command=describe_command(options, Path("DIR")),
        places_left_out=options.to_json() != manifest["options"],
    )


def _escaped(text: object) -> str:
    """Text of others, without effect as Markdown or HTML and on one line."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", " ".join(str(text).split()))


def _parts(page: str) -> dict[str, str]:
    """Sections of report.md by heading; what stands between title and first section is "lead"."""
    found: dict[str, list[str]] = {"lead": []}
    lines = found["lead"]
    for line in page.splitlines():
        if line.startswith("## "):
            lines = found.setdefault(line.removeprefix("## "), [])
        elif not line.startswith("# "):
            lines.append(line)
    missing = [name for name in _SECTIONS if name not in found]
    if missing:
        raise NblError(f"report.md has no section {missing[0]}; run nbl-export report DIR again")
    return {name: "\n".join(part).strip() for name, part in found.items()}
