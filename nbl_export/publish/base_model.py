"""Hub id, licence and languages of a run's base model.

    hub id              the front matter of README.md at the revision of the run
    directory           the front matter of DIR/README.md
    GGUF                general.license, general.languages, general.repo_url of the metadata

Nothing is guessed: a fact that these sources do not state is unknown. A file that has changed since the run is not
read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError, UsageError

__all__ = ["BaseModel", "check_hub_id", "find"]

_HUB = "https://huggingface.co/"
_FACTS = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class BaseModel:
    """A model's identity and terms.

    hub_id: None if the run was made from files and nothing states which model they are.
    licence: an identifier of the hub ("apache-2.0", "other"); None if it is not stated.
    origin: the source of the licence, in words.
    """

    title: str
    hub_id: str | None = None
    revision: str | None = None
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    languages: tuple[str, ...] = ()
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
    """
    model, place = manifest["model"], manifest.get("places", {}).get("model")
    revision = model.get("revision")
    if hub_id and revision and hub_id != model["name"]:
        raise NblError(f"this run was made from {model['name']}, not from {hub_id}; leave --base-model out")
    facts, origin = _of_files(Path(place), model["fingerprint"]) if place else ({}, "")
    hub_id = hub_id or (model["name"] if revision else facts.get("hub_id"))
    if not facts.get("license") and hub_id:
        facts, origin = {**facts, **_of_hub(hub_id, revision)}, f"the card of {hub_id}"
    return BaseModel(
        title=str(model.get("title") or hub_id or Path(model["name"]).name),
        hub_id=hub_id,
        revision=revision,
        licence=facts.get("license"),
        licence_name=facts.get("license_name"),
        licence_link=_absolute(facts.get("license_link"), hub_id),
        languages=facts.get("language", ()),
        origin=origin if facts.get("license") else "",
    )


def _of_files(place: Path, fingerprint: str) -> tuple[dict[str, Any], str]:
    """Facts of a local model and their source; empty if the model is gone or has changed."""
    from nbl_export.model.checkpoint import source as checkpoint

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
    import gguf

    reader = gguf.GGUFReader(str(file))
    fields = {name: reader.get_field(f"general.{name}") for name in ("license", "license.name", "license.link",
              "languages", "repo_url", "source.repo_url")}  # fmt: skip
    values = {name: field.contents() for name, field in fields.items() if field is not None}
    url = str(values.get("repo_url") or values.get("source.repo_url") or "")
    hub_id = re.fullmatch(rf"{re.escape(_HUB)}([\w.-]+/[\w.-]+)/?", url)
    stated = _clean({
        "license": values.get("license"),
        "license_name": values.get("license.name"),
        "license_link": values.get("license.link"),
        "language": values.get("languages"),
    })  # fmt: skip
    return {**stated, "hub_id": hub_id[1]} if hub_id else stated


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
        return _clean(ModelCard.load(file).data.to_dict())
    except Exception:  # parsing raises several types
        return {}


def _clean(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The needed facts that have the right type; the authors of the model wrote them."""
    found: dict[str, Any] = {k: stated[k] for k in _FACTS if isinstance(stated.get(k), str) and stated[k].strip()}
    languages = stated.get("language")
    listed = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    return {**found, "language": tuple(word for word in listed if isinstance(word, str))}


def _absolute(link: str | None, hub_id: str | None) -> str | None:
    """An absolute link; a relative link points into the base model's repository."""
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"{_HUB}{hub_id}/blob/main/{link}" if hub_id else None
