"""The model card: README.md of a model folder, as the hub shows it.

    report.json, nbl.json, the base model's card ─► card.md.jinja ─► DIR/model/README.md

Speed and quality loss are the report's own blocks, so card and report cannot disagree. The manifest notes what was
written, so that an edited card is never overwritten.
"""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.files import file_sha256, friendly_os_errors
from nbl_export.options.options import describe_command, public_options
from nbl_export.publish import base_model
from nbl_export.publish.base_model import BaseModel
from nbl_export.records.from_json import edited
from nbl_export.records.results import COMPARED, VERIFIED
from nbl_export.report.document import written
from nbl_export.report.model import head
from nbl_export.report.quality import quality
from nbl_export.report.speed import speed
from nbl_export.report.table import escaped
from nbl_export.run_directory import REPORT_JSON, RunDirectory
from nbl_export.targets import load_engine
from nbl_export.targets.providers import PROVIDERS

__all__ = ["CARD", "check_publishable", "render", "write_card"]

CARD = "model/README.md"
_CPU_PACKAGES = ("onnxruntime", "onnxruntime-genai")
_TAGS = ["onnx", "onnxruntime", "onnxruntime-genai", "neural-block-linearization", "text-generation"]


def write_card(directory: Path, hub_id: str | None = None, *, force: bool = False) -> Path:
    """Write DIR/model/README.md from a finished run.

    Args:
        hub_id: of the base model, if the run was made from files.
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
        base = base_model.find(run.manifest, hub_id)
        with edited(run.path / REPORT_JSON, "run nbl-export report DIR again"):
            text = render(run.manifest, run.read_json(REPORT_JSON), base, chat=_has_template(run.path / "model"))
        with friendly_os_errors(target), run.scratch() as scratch:
            (scratch / "README.md").write_text(text, encoding="utf-8")
            os.replace(scratch / "README.md", target)
        run.save(card={"sha256": file_sha256(target)})
        return target


def check_publishable(run: RunDirectory, *, force: bool) -> None:
    """Refuse what should not go out: unfinished, failed (unless `force`), damaged, or bound to one machine.

    Raises:
        NblError, CorruptError: with the reason.
    """
    options = run.manifest["options"]
    if load_engine(options["engine"], options.get("provider", "cpu")).capabilities.static:
        raise NblError(
            f"{run.path} is for engine {options['engine']}, whose result belongs to the machine it was compiled for; "
            "publish a run of --engine ort"
        )
    missing = [stage for stage in ("rewrite", "verify", "report") if stage not in run.stages]
    if missing:
        raise NblError(f"{run.path} is not finished: run its command again ({run.manifest['command']})")
    if run.manifest["status"] not in (VERIFIED, COMPARED) and not force:
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


def render(manifest: Mapping[str, Any], report: Mapping[str, Any], base: BaseModel, *, chat: bool = False) -> str:
    """The text of the card; the same input gives the same bytes.

    Args:
        manifest: nbl.json of the run directory.
        report: the value of report.json.
        base: what is known of the base model.
        chat: the model folder has a chat template, which the programs then use.
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
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(manifest, report, base, chat)}")
    return str(card)


def _line(text: str) -> str:
    """Text that stays in an indented block."""
    return " ".join(text.splitlines())


def _body(manifest: Mapping[str, Any], report: Mapping[str, Any], base: BaseModel, chat: bool) -> str:
    import jinja2

    source = importlib.resources.files("nbl_export.publish").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"text": escaped, "blocks": written, "line": _line}
    options = public_options(manifest)
    provider = PROVIDERS.get(options.provider)  # None for the CPU
    packages = provider.packages if provider else _CPU_PACKAGES
    memory = (report["machine"] or {}).get("memory_bytes")
    return environment.from_string(source).render(
        base=base,
        chat=chat,
        report=report,
        decoder=manifest["decoder"],
        dropped=report["fit"] == "drop",
        distilled=manifest.get("fit", {}).get("kind") == "distilled",
        lead=head(report),
        speed=speed(report),
        quality=quality(report),
        genai_packages=" ".join(packages),
        onnxruntime_package=packages[0],
        library=bool(provider and provider.registered),
        memory="–" if memory is None else f"{memory / 2**30:.1f} GiB",
        command=describe_command(options, Path("DIR")),
        places_left_out=options.to_json() != manifest["options"],
    )
