"""The model card: README.md of a model folder, as the hub shows it.

    results of the run, the base model's card ─► card.md.jinja ─► DIR/model/README.md

Speed and quality loss are the report's own blocks, so card and report cannot disagree. The manifest notes what was
written, so that an edited card is never overwritten.

Licence and languages are those of the base model's card: in its hub repository, or beside the weights. The metadata of
a GGUF file state them too. Nothing is guessed, and a file that has changed since the run is not read.
"""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError
from nbl_export.files import file_sha256, friendly_os_errors
from nbl_export.model.architectures import ARCHITECTURES
from nbl_export.options.command import describe_command
from nbl_export.options.public import public_options
from nbl_export.records.results import VERIFIED
from nbl_export.report.document import written
from nbl_export.report.model import head
from nbl_export.report.page import of_run
from nbl_export.report.quality import quality
from nbl_export.report.speed import speed
from nbl_export.report.table import escaped
from nbl_export.run_directory import RunDirectory
from nbl_export.targets import load_engine
from nbl_export.trust.model_settings import read_object, read_text
from nbl_export.trust.terminal import visible

__all__ = ["CARD", "BaseModel", "check_hub_id", "check_publishable", "find", "render", "write_card"]

CARD = "model/README.md"
_MOST_CARD_BYTES = 1 << 20  # of the card of a base model
# By the value of --provider.
_PACKAGES = {"cpu": ("onnxruntime", "onnxruntime-genai"), "cuda": ("onnxruntime-gpu", "onnxruntime-genai-cuda")}
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
        check_hub_id(hub_id, "--base-model")
    with RunDirectory(directory).opened(create=False) as run:
        check_publishable(run, force=force)
        target = run.path / CARD
        written_before = run.manifest.get("card", {}).get("sha256")
        if not force and target.exists() and file_sha256(target) != written_before:
            raise NblError(f"{target} is not as nbl-export wrote it; move it away, or use --force to replace it")
        base = find(run.manifest, hub_id)
        settings = run.path / "model" / "tokenizer_config.json"
        has_template = settings.is_file() and "chat_template" in read_object(settings)
        has_template |= (run.path / "model" / "chat_template.jinja").is_file()
        text = render(run.manifest, of_run(run), base, chat=has_template)
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
    run.require("rewrite", "verify", "report")
    if run.manifest["status"] != VERIFIED and not force:
        raise NblError(f"{run.path} failed verification; see its verify.json, or use --force to go on all the same")
    for stage in sorted(run.stages.keys() & {"rewrite", "verify", "bench", "eval", "report"}):
        run.check(stage)


def render(manifest: Mapping[str, Any], report: Mapping[str, Any], base: BaseModel, *, chat: bool = False) -> str:
    """The text of the card; the same input gives the same bytes.

    Args:
        manifest: nbl.json of the run directory.
        report: the value of report.json.
        base: what is known of the base model.
        chat: the model folder has a chat template, which the programs then use.
    """
    import jinja2

    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError as error:
        raise MissingPackageError("huggingface_hub", "export", "writing a model card") from error
    source = importlib.resources.files("nbl_export.publish").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"text": escaped, "blocks": written, "line": _line}
    options = public_options(manifest)
    packages = _PACKAGES[options.provider]
    record = ARCHITECTURES.get(manifest["decoder"]["architecture"])
    memory = (report["machine"] or {}).get("memory_bytes")
    body = environment.from_string(source).render(
        base=base,
        terms={**dict.fromkeys(_TERMS), **base.terms},
        chat=chat,
        report=report,
        decoder=manifest["decoder"],
        tried=record.tried if record else "",
        dropped=report["fit"] == "drop",
        distilled=manifest.get("fit", {}).get("kind") == "distilled",
        lead=head(report),
        speed=speed(report),
        quality=quality(report),
        genai_packages=" ".join(packages),
        onnxruntime_package=packages[0],
        memory="–" if memory is None else f"{memory / 2**30:.1f} GiB",
        command=describe_command(options, Path("DIR")),
        places_left_out=options.to_json() != manifest["options"],
    )
    data = ModelCardData(base_model=base.hub_id, **base.terms, pipeline_tag="text-generation", tags=_TAGS)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _line(text: str) -> str:
    """Text that stays in an indented block."""
    return visible(" ".join(text.splitlines()))


_HUB = "https://huggingface.co/"
_TERMS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """A model's identity and terms.

    Attributes:
        hub_id: None if the run was made from files and nothing states which model they are.
        terms: fields of `ModelCardData`: license ("apache-2.0", "other"), license_name, license_link, language.
        origin: the source of the licence, in words.
    """

    title: str
    hub_id: str | None = None
    revision: str | None = None
    terms: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""


def check_hub_id(name: str, what: str) -> None:
    """Check that a name has the form OWNER/NAME.

    Raises:
        UsageError: the name has another form.
        MissingPackageError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub.utils import HFValidationError, validate_repo_id
    except ImportError as error:
        raise MissingPackageError("huggingface_hub", "export", "writing for the hub") from error
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"{what} {name!r} is not a hub id (OWNER/NAME): {error}") from error
    if name.count("/") != 1:
        raise UsageError(f"{what} {name!r} is not a hub id; write OWNER/NAME")


def find(manifest: Mapping[str, Any], hub_id: str | None = None) -> BaseModel:
    """The base model of a run directory.

    Args:
        manifest: nbl.json of the run directory.
        hub_id: the hub id that the user gives; needed if the run was made from files.

    Raises:
        NblError: the run was made from a hub model other than `hub_id`.
        UsageError: the run or its files state a hub id that the hub would not take.
    """
    model = manifest["model"]
    place = manifest.get("places", {}).get("model")
    revision = model.get("revision")
    if hub_id and revision and hub_id != model["name"]:
        raise NblError(f"this run was made from {model['name']}, not from {hub_id}; leave --base-model out")
    terms, origin = _of_files(Path(place), model["fingerprint"]) if place else ({}, "")
    stated = terms.pop("hub_id", None)
    hub_id = hub_id or (model["name"] if revision else stated)
    if hub_id:
        check_hub_id(hub_id, "the base model")
    if "license" not in terms and hub_id:
        terms = {**terms, **_of_hub(hub_id, revision)}
        origin = f"the card of {hub_id}"
    link = terms.get("license_link", "https://")
    if not link.startswith(("https://", "http://")):  # it points into the base model's repository
        terms["license_link"] = f"{_HUB}{hub_id}/blob/main/{link}" if hub_id else None
    title = str(model.get("title") or hub_id or Path(model["name"]).name)
    return BaseModel(title, hub_id, revision, terms, origin if "license" in terms else "")


def _of_files(place: Path, fingerprint: str) -> tuple[dict[str, Any], str]:
    """Facts of a local model and their source; empty if the model is gone or has changed."""
    from nbl_export.methods.checkpoint import source as checkpoint

    try:
        source = checkpoint.resolve(str(place))
    except NblError:
        return {}, ""
    if source.fingerprint != fingerprint:
        return {}, ""
    if source.gguf is not None:
        return _of_gguf(source.gguf), f"the metadata of {source.gguf.name}"
    return _of_card(source.directory / "README.md"), "the card beside the weights"


def _of_gguf(file: Path) -> dict[str, Any]:
    from nbl_export.model.checkpoint import pretrained

    fields = pretrained.reader(file).fields
    values = {name.removeprefix("general."): field.contents() for name, field in fields.items() if "general." in name}
    url = str(values.get("repo_url") or values.get("source.repo_url") or "")
    hub_id = re.fullmatch(rf"{re.escape(_HUB)}([\w.-]+/[\w.-]+)/?", url)
    terms = {name.replace(".", "_"): values.get(name) for name in ("license", "license.name", "license.link")}
    return _clean({**terms, "language": values.get("languages")}) | ({"hub_id": hub_id[1]} if hub_id else {})


def _of_hub(hub_id: str, revision: str | None) -> dict[str, Any]:
    """Facts of the card in the local cache or on the hub; empty if neither has a card."""
    import huggingface_hub
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    try:
        return _of_card(Path(huggingface_hub.hf_hub_download(hub_id, "README.md", revision=revision)))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError):  # offline, removed, gated or missing
        return {}


def _of_card(file: Path) -> dict[str, Any]:
    """Facts of a card's front matter; empty if there is no card or the card is unreadable."""
    from huggingface_hub import ModelCard

    try:
        return _clean(ModelCard(read_text(file, _MOST_CARD_BYTES)).data.to_dict())
    except Exception:  # parsing raises several types
        return {}


def _clean(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The terms that have the right type; the authors of the model wrote them."""
    terms = {name: stated[name] for name in _TERMS if isinstance(stated.get(name), str) and stated[name].strip()}
    languages = stated.get("language")
    listed = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    words = [word for word in listed if isinstance(word, str)]
    return {**terms, "language": words} if words else terms
