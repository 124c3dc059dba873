"""Resolves a hub id, directory or file to a local model, and checks the model without loading it.

"org/name"            -> huggingface_hub snapshot (safetensors, config, tokenizer; never .bin)
DIR with safetensors  -> used in place
FILE.gguf or its DIR  -> dequantised by transformers into RUN/checkpoint, once
NBL checkpoint        -> converted to a stock checkpoint in RUN/checkpoint, once (`hf.restored`)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.files import file_sha256, key_of, safetensors_tensors
from nbl_export.graph.gguf_header import Header, read_header
from nbl_export.graph.names import TEXT_FILES, has_graph
from nbl_export.methods import METHODS
from nbl_export.model.architectures import ARCHITECTURES, LINEARIZED, REFUSED, check_config, is_hybrid, supported_near
from nbl_export.model.checkpoint import pretrained
from nbl_export.model.checkpoint.pretrained import read_config
from nbl_export.model.checkpoint.weights import INDEX, weight_files
from nbl_export.records.decoder import HYBRID
from nbl_export.records.plan import TAPS, USUAL_KIND
from nbl_export.trust.contained import check_folder, check_inside, refuse_special
from nbl_export.trust.model_settings import check_checkpoint, check_layers

__all__ = [
    "Linearized",
    "Source",
    "check_architecture",
    "checked_config",
    "gguf_config",
    "gguf_of",
    "hub_config",
    "is_hub_id",
    "refuse_graph",
    "resolve",
]

log = logging.getLogger(__name__)


# What transformers and runtimes read of a checkpoint: loaded, hashed and fetched by one list.
_READ = ("*.safetensors", INDEX, *TEXT_FILES, "tokenizer*", "*.model", "tekken.json", "vocab*", "chat_template*",
         "additional_chat_templates/*")  # fmt: skip
_HUB_FILES = (*_READ, "README.md")  # holds the licence


@dataclass(frozen=True)
class Linearized:
    """The replaced layers, their kinds (`nbl_export.methods`), tap and hidden size, from config.json."""

    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    tap: str
    size: int


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `fingerprint` changes when the model's files change.

    weights: files of a safetensors checkpoint. linearized: None if the model is not an NBL checkpoint.
    """

    name: str
    directory: Path
    gguf: Path | None
    revision: str | None
    fingerprint: str
    weights: tuple[Path, ...] = ()
    linearized: Linearized | None = None

    @property
    def title(self) -> str:
        """The model's name in a report: hub id, GGUF file or directory name."""
        return self.name if self.revision else (self.gguf.stem if self.gguf else self.directory.absolute().name)

    @property
    def place(self) -> str | None:
        """Absolute path of a local model; None for a model of the hub."""
        return None if self.revision else str((self.gguf or self.directory).absolute())


def resolve(model: str) -> Source:
    """Find a model and check it without loading it.

    Raises:
        NblError: the model is missing, truncated, pickled, or of an unsupported architecture.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        check_folder(path)
    refuse_special(path)
    refuse_graph(path)
    gguf = gguf_of(path)
    if gguf is not None:
        return _gguf_source(model, gguf)
    if path.is_dir():
        return _directory_source(model, path, None)
    if path.exists():
        advice = f"; give its directory, {path.parent}" if path.suffix == ".safetensors" else ""
        raise NblError(f"{path} is not a model: expected a directory with safetensors, or a .gguf file{advice}")
    if not is_hub_id(model):
        raise NblError(f"no model at {model}: give a local directory, a .gguf file or a hub id (org/name)")
    directory = _fetched(model, lambda hub: hub.snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    return _directory_source(model, directory, directory.name)


def refuse_graph(path: Path) -> None:
    """Raise NblError if a model is an ONNX graph, or a directory with a graph and no weights for torch."""
    weights = path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.gguf")))
    if path.exists() and has_graph(path) and not weights:
        raise NblError(
            f"{path} is an ONNX graph, and a job needs the checkpoint that it was made from; "
            "nbl-export rewrite-graph puts the maps of a job into a graph"
        )


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: the file itself, or the only one in a directory without config.json.

    Raises:
        NblError: the directory holds several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise NblError(f"{path} holds {len(found)} GGUF files; name one of them, such as {found[0].name}")
    return found[0] if found else None


def is_hub_id(model: str) -> bool:
    """Whether a name that is no file here can be a repository of the hub."""
    return not (Path(model).is_absolute() or model.startswith((".", "~"))) and model.count("/") == 1


def hub_config(repo: str) -> Path:
    """The config.json of a model of the hub, and no other file.

    Raises:
        NblError: the hub does not have it, or cannot be reached.
    """
    return _fetched(repo, lambda hub: hub.hf_hub_download(repo, "config.json"))


def _fetched(repo: str, fetch: Callable[[Any], str]) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingPackageError("huggingface_hub", "export", f"fetching {repo}") from error
    try:
        return Path(fetch(huggingface_hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            reason = "the hub does not have it, or it is gated (huggingface-cli login)"
        else:
            reason = "it is not in the local cache and the hub cannot be reached"
        raise NblError(
            f"no model {repo}: no such local directory, and {reason}; check the name, the network or HF_HUB_OFFLINE"
        ) from error


def _directory_source(name: str, directory: Path, revision: str | None) -> Source:
    check_checkpoint(directory)
    config, replaced = checked_config(read_config(directory), directory / "config.json")
    weights = weight_files(directory)
    names = {name for file in weights for name in safetensors_tensors(file)}
    check_layers(config.get("num_hidden_layers"), names, directory / "config.json")
    read = {file for pattern in _READ for file in directory.glob(pattern) if file.is_file()}
    fingerprint = _fingerprint(sorted({*read, *weights}), directory)
    return Source(name, directory, None, revision, fingerprint, weights=tuple(weights), linearized=replaced)


def checked_config(config: dict[str, Any], where: Path) -> tuple[dict[str, Any], Linearized | None]:
    """A configuration (config.json) with the original's architecture, and the replaced layers of an NBL checkpoint.

    Raises:
        NblError: the model is not supported, or its replaced layers are impossible.
    """
    replaced = _linearized_of(config, where)
    if replaced is not None:
        config = {**config, "model_type": config["model_type"].removeprefix(LINEARIZED)}
    check_architecture(config, where)
    check_config(config, where)
    return config, replaced


def _linearized_of(config: dict[str, Any], where: Path) -> Linearized | None:
    """Layers and tap of an NBL checkpoint's configuration; None for another checkpoint.

    Raises:
        NblError: the layers, the tap or the exit layer are impossible.
    """
    if not str(config.get("model_type")).startswith(LINEARIZED):
        return None
    stated: Any = [config.get(name) for name in ("nbl_replaced_layers", "nbl_tap", "num_hidden_layers")]
    layers, tap, count = stated
    numbers = isinstance(layers, list) and all(type(i) is int for i in layers) and type(count) is int
    is_part = numbers and layers and all(0 <= i < count for i in layers) and len(set(layers)) < count
    if not is_part or tap not in TAPS:
        raise NblError(f"{where} replaces layers {layers} of {count} at the tap {tap!r}; save the checkpoint again")
    size = config.get("hidden_size")  # checked later
    kinds_given = config.get("nbl_kinds") or [USUAL_KIND] * len(layers)
    is_known = isinstance(kinds_given, list) and len(kinds_given) == len(layers) and kinds_given[0] in METHODS
    if not is_known or any(kind != kinds_given[0] for kind in kinds_given):
        raise NblError(f"{where} has layers of the kinds {kinds_given}; it takes one of {', '.join(METHODS)} for all")
    made = dict(sorted(zip(layers, kinds_given, strict=True)))
    positions = config.get("max_position_embeddings")
    try:
        METHODS[kinds_given[0]].check_facts(config.get("nbl_exit"), tuple(made), int(count or 0), positions)
    except ValueError as error:
        raise NblError(f"{where.parent}: {error}; save the checkpoint again") from error
    return Linearized(tuple(made), tuple(made.values()), str(tap), size if isinstance(size, int) else 0)


def check_architecture(config: Mapping[str, Any], where: Path) -> None:
    """Refuse an architecture that is not supported, with the reason if it is known.

    Args:
        config: the content of config.json, or what a GGUF file states of it.
    """
    model_type = config.get("model_type")
    if is_hybrid(config):
        raise NblError(f"{where} is of a hybrid model ({model_type}), which is not supported: {HYBRID}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        advice = "; its language model, saved by itself, may be one of them" if "text_config" in config else ""
        reason = REFUSED.get(str(model_type))
        why = "" if reason is None else f": {reason}"
        raise NblError(
            f"{where} has architecture {model_type!r}, which is not supported{why}; "
            f"{supported_near(model_type)}{advice}"
        )


def _gguf_source(name: str, file: Path) -> Source:
    check_inside(file, file.parent)
    try:
        pretrained.reader(file)  # finds where a file ends early
    except ImportError as error:
        raise MissingPackageError("gguf", "export", f"reading {file}") from error
    except NblError:
        raise
    except Exception as error:  # the reader raises whatever numpy raises on a short or foreign file
        read_header(file)  # says what is wrong with it
        size = file.stat().st_size
        raise NblError(
            f"{file} is truncated or damaged behind its header: it has {size:,} bytes; fetch it again"
        ) from error
    header = read_header(file)
    if (parts := header.keys.get("split.count", 0)) not in (0, 1):
        raise NblError(f"{file} is one of {parts} parts; put them together (llama-gguf-split --merge)")
    check_architecture(gguf_config(header), file)
    for key, stated in header.keys.items():
        if key.endswith(".block_count"):  # transformers reads the key of any architecture
            check_layers(stated, header.shapes, file)
    return Source(name, file.parent, file, None, _fingerprint([file], file.parent))


def gguf_config(header: Header) -> dict[str, Any]:
    """The architecture and the sizes of the MLP that the head of a GGUF file states, under transformers' names."""
    aliases = {alias: record.name for record in ARCHITECTURES.values() for alias in record.aliases}
    stated = header.keys.get("general.architecture")
    return {"model_type": aliases.get(str(stated), stated), "intermediate_size": header.get("feed_forward_length")}


def _fingerprint(files: list[Path], directory: Path) -> str:
    """Changes with the name, the size or any byte of a file."""
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
            hashed = zip(files, pool.map(file_sha256, files), strict=True)
        facts = [(str(file.relative_to(directory)), file.stat().st_size, digest) for file, digest in hashed]
    except OSError as error:
        raise NblError(f"{error.filename} cannot be read: {error.strerror}; fetch the model again") from error
    return key_of(facts)
