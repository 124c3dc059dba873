"""Hub id, directory or GGUF -> a local safetensors checkpoint, its tokenizer and its decoder spec.

"org/name"            -> huggingface_hub snapshot (safetensors, config, tokenizer; never .bin)
DIR with safetensors  -> used where it is
DIR with model.onnx   -> where there are no weights for torch: a graph, see `graph_source`
FILE.gguf or its DIR  -> dequantised by transformers into RUN/checkpoint, once
NBL checkpoint        -> made a stock one in RUN/checkpoint, once, see `hf.restored`
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export import graph_source
from nbl_export.architectures import ARCHITECTURES, check_config, windows_of
from nbl_export.artifacts import key_of
from nbl_export.errors import MissingPackageError, NblError
from nbl_export.file_hashes import sha256_of
from nbl_export.given_graph import home_of
from nbl_export.model_settings import CONFIG_BYTES, check_checkpoint, check_settings
from nbl_export.plain_files import refuse_special
from nbl_export.pretrained import config_of, model_of, quiet_transformers, tokenizer_of
from nbl_export.records import TAPS, DecoderSpec
from nbl_export.strict_json import read_object

__all__ = [
    "LINEARIZED",
    "Linearized",
    "Source",
    "load_model",
    "load_tokenizer",
    "materialise",
    "read_spec",
    "resolve",
]

log = logging.getLogger(__name__)

LINEARIZED = "nbl-"  # before the architecture, in the config.json of an NBL checkpoint
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
              "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*",
              "README.md")  # the licence stands in it  # fmt: skip
_WEIGHTS = "model.safetensors"
_MARKER = "source.json"


@dataclass(frozen=True)
class Linearized:
    """What the config.json of an NBL checkpoint says of it: the layers that have maps, and what those act on."""

    layers: tuple[int, ...]
    tap: str


@dataclass(frozen=True)
class Source:
    """Where a model comes from. `fingerprint` changes when its files do.

    graph: the ONNX file, where that is all there is of the model.
    weights: files of a safetensors checkpoint. linearized: None where it is not an NBL checkpoint.
    """

    name: str
    directory: Path
    gguf: Path | None
    revision: str | None
    fingerprint: str
    graph: Path | None = None
    weights: tuple[Path, ...] = ()
    linearized: Linearized | None = None

    @property
    def title(self) -> str:
        """What to call the model in a report: hub id, GGUF file or directory name."""
        return self.name if self.revision else (self.gguf.stem if self.gguf else self.directory.absolute().name)

    @property
    def place(self) -> str | None:
        """Absolute path of a local model; None for one of the hub."""
        file = self.gguf or (self.graph if self.name.endswith(".onnx") else None)
        return None if self.revision else str((file or self.directory).absolute())


def resolve(model: str) -> Source:
    """Find a model and check what can be checked without loading it.

    Raises:
        NblError: missing, truncated, pickled, or of an unsupported architecture.
    """
    path = Path(model).expanduser()
    refuse_special(path)
    graph = graph_source.graph_of(path)
    if graph is not None:
        check_checkpoint(home_of(graph))
        files = graph_source.files_of(graph)
        return Source(model, home_of(graph), None, None, _fingerprint(files), graph)
    if path.is_file() and path.suffix == ".gguf":
        return _gguf_source(model, path)
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if not (path / "config.json").exists() and ggufs:
            if len(ggufs) > 1:
                raise NblError(f"{path} holds {len(ggufs)} GGUF files; name one of them: {ggufs[0].name}, ...")
            return _gguf_source(model, ggufs[0])
        return _directory_source(model, path, None)
    if path.exists():
        raise NblError(f"{path} is not a model: expected a directory with safetensors, or a .gguf file")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise NblError(f"no model at {path}: give a local directory, a .gguf file or a hub id (org/name)")
    return _hub_source(model)


def _hub_source(repo: str) -> Source:
    try:
        import huggingface_hub
        from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingPackageError("huggingface_hub", "export", f"fetching {repo}") from error
    try:
        directory = Path(huggingface_hub.snapshot_download(repo, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
            reason = "the hub does not have it, or it is gated (huggingface-cli login)"
        else:
            reason = "it is not in the local cache and the hub cannot be reached"
        raise NblError(
            f"no model {repo}: no such local directory, and {reason}; check the name, the network or HF_HUB_OFFLINE"
        ) from error
    return _directory_source(repo, directory, directory.name)


def _directory_source(name: str, directory: Path, revision: str | None) -> Source:
    check_checkpoint(directory)
    config = _read_config(directory)
    replaced = _linearized(config, directory / "config.json")
    if replaced is not None:
        config = {**config, "model_type": config["model_type"].removeprefix(LINEARIZED)}
    _check_architecture(config.get("model_type"), directory, multimodal="text_config" in config)
    check_config(config, directory / "config.json")
    weights = _weight_files(directory)
    _check_safetensors(weights)
    tokenizer = [file for file in sorted(directory.glob("tokenizer*")) if file.is_file()]
    fingerprint = _fingerprint([directory / "config.json", *weights, *tokenizer])
    return Source(name, directory, None, revision, fingerprint, weights=tuple(weights), linearized=replaced)


def _linearized(config: dict[str, Any], where: Path) -> Linearized | None:
    """What a configuration says of an NBL checkpoint; None where it is of another.

    Raises:
        NblError: its layers or its tap cannot be.
    """
    if not str(config.get("model_type")).startswith(LINEARIZED):
        return None
    layers, tap, count = (config.get(name) for name in ("nbl_replaced_layers", "nbl_tap", "num_hidden_layers"))
    numbers = isinstance(layers, list) and all(type(i) is int for i in layers) and type(count) is int
    if not numbers or not layers or not set(layers) < set(range(count)) or tap not in TAPS:  # type: ignore[arg-type]
        raise NblError(f"{where} replaces layers {layers} of {count} at the tap {tap!r}; save the checkpoint again")
    return Linearized(tuple(sorted(set(layers))), str(tap))


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise NblError(f"{directory} is not a model directory: it has no config.json")
    return read_object(path, CONFIG_BYTES)


def _check_architecture(model_type: Any, where: Path, *, multimodal: bool = False) -> None:
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        advice = "; its language model, saved by itself, may be one of these" if multimodal else ""
        raise NblError(
            f"{where} has architecture {model_type!r}, which is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}{advice}"
        )


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [n for n in names if Path(n).name != n or n == ".."]
        except (ValueError, KeyError, AttributeError, TypeError, OSError, RecursionError) as error:
            raise NblError(f"{index} cannot be read ({error}); fetch the model again") from error
        if not names:
            raise NblError(f"{index} names no file; fetch the model again")
        if outside:
            raise NblError(f"{index} names a file outside {directory}; this checkpoint is not to be trusted")
        files = [directory / n for n in names]
        missing = [f.name for f in files if not f.exists()]
        if missing:
            raise NblError(f"{directory} lacks {missing[0]}, which its index names; fetch the model again")
        return files
    if not (directory / _WEIGHTS).is_file():  # transformers would look for a pickle, whatever else lies there
        pickled = sorted(directory.glob("*.bin")) + sorted(directory.glob("*.pt*"))
        other = [file.name for file in sorted(directory.glob("*.safetensors"))]
        hint = f"; {other[0]} is not named {_WEIGHTS}, and no index names it" if other else ""
        hint += f"; {pickled[0].name} is a pickle, which is not read: convert it to safetensors" if pickled else ""
        raise NblError(f"{directory} has no safetensors weights{hint}")
    return sorted(directory.glob("*.safetensors"))


def _check_safetensors(files: list[Path]) -> None:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(str(file), framework="np"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise NblError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error


def _gguf_source(name: str, file: Path) -> Source:
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("gguf", "export", f"reading {file}") from error
    try:
        reader = gguf.GGUFReader(str(file))
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field is not None else None
    except Exception as error:  # the reader raises whatever numpy raises on a short or foreign file
        raise NblError(f"{file} is truncated or not a GGUF file ({error}); fetch it again") from error
    check_settings(file.parent)
    aliases = {alias: record.name for record in ARCHITECTURES.values() for alias in record.aliases}
    _check_architecture(aliases.get(str(architecture), architecture), file)
    return Source(name, file.parent, file, None, _fingerprint([file]))


def _fingerprint(files: list[Path]) -> str:
    """Changes with the name, the size or any byte of a file."""
    try:
        facts = [(file.name, file.stat().st_size, digest) for file, digest in zip(files, sha256_of(files), strict=True)]
    except OSError as error:
        raise NblError(f"{error.filename} cannot be read: {error.strerror}; fetch the model again") from error
    return key_of(facts)


def read_spec(source: Source) -> DecoderSpec:
    """The decoder's numbers, through optimum's normalized configs.

    Raises:
        NblError: not a decoder of a supported architecture, or a configuration that contradicts itself.
    """
    if source.graph is not None:
        return graph_source.read_spec(source.graph)
    quiet_transformers()
    from optimum.utils import NormalizedTextConfigWithGQA

    _register(source)
    try:
        config = config_of(source.directory, source.gguf.name if source.gguf else None)
        architecture = config.model_type.removeprefix(LINEARIZED if source.linearized else "")
        _check_architecture(architecture, source.directory)
        normal = NormalizedTextConfigWithGQA(config)
        head_dim = getattr(config, "head_dim", None) or normal.hidden_size // normal.num_attention_heads
        windows = windows_of(config)
        return DecoderSpec(
            architecture=architecture,
            num_layers=normal.num_layers,
            hidden_size=normal.hidden_size,
            num_heads=normal.num_attention_heads,
            num_kv_heads=normal.num_key_value_heads,
            head_dim=head_dim,
            vocab_size=normal.vocab_size,
            max_positions=config.max_position_embeddings,
            sliding_window=next(filter(None, windows), None),
            full_layers=tuple(i for i, window in enumerate(windows) if window is None) if any(windows) else (),
        )
    except NblError:
        raise
    except Exception as error:  # transformers raises many kinds on a damaged configuration
        raise NblError(f"{source.name} has no usable decoder configuration: {error}") from error


def _register(source: Source) -> None:
    """Let transformers know the classes of an NBL checkpoint."""
    if source.linearized is not None:
        import nbl_export.hf  # noqa: F401


def materialise(source: Source, target: Path) -> Path:
    """A directory with safetensors, config and tokenizer of a stock model; a GGUF or NBL checkpoint is made one there.

    Complete or absent: `target` is renamed into place, and kept for later runs on the same model; made again
    where one of its files is missing or cut.
    """
    if source.gguf is None and source.linearized is None:
        return source.directory
    if _is_whole(target, source):
        return target
    quiet_transformers()
    _register(source)
    scratch = target.with_name(f".tmp-checkpoint-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    origin = source.gguf or source.directory
    try:
        if source.gguf is not None:
            _dequantise(source.gguf, scratch)
        else:
            _restore(source.directory, scratch)
    except (OSError, MemoryError, NblError):
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise NblError(f"{origin} cannot be loaded by transformers: {_reason(error)}") from error
    sizes = {f.name: f.stat().st_size for f in sorted(scratch.iterdir())}
    facts = {"fingerprint": source.fingerprint, "file": origin.name, "sizes": sizes}
    (scratch / _MARKER).write_text(json.dumps(facts), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    return target


def _restore(directory: Path, out: Path) -> None:
    from nbl_export import hf

    log.info("writing the stock checkpoint of %s", directory.name)
    hf.restored(load_model(directory)).save_pretrained(out)
    load_tokenizer(directory).save_pretrained(out)


def _dequantise(gguf: Path, out: Path) -> None:
    log.info("dequantising %s", gguf.name)
    model, _ = model_of(gguf.parent, gguf.name)
    # transformers refuses to save what came quantised; these weights no longer are.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(out)
    tokenizer_of(gguf.parent, gguf.name).save_pretrained(out)


def _is_whole(target: Path, source: Source) -> bool:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        facts = json.loads((target / _MARKER).read_text(encoding="utf-8"))
        same = facts["fingerprint"] == source.fingerprint
        return same and all((target / n).stat().st_size == size for n, size in facts["sizes"].items())
    return False


def _reason(error: Exception) -> str:
    """What a library says, but for what points at a report that is not shown."""
    if "ignore_mismatched_sizes" in str(error):
        return "weights do not have the shapes that config.json states; fetch the model again"
    return f"{type(error).__name__}: {error}"


def load_model(directory: Path) -> Any:
    """The torch model in float32, in evaluation mode, on the CPU.

    Raises:
        NblError: transformers cannot load it.
    """
    try:
        model, report = model_of(directory)
    except (MemoryError, NblError):
        raise
    except Exception as error:
        raise NblError(f"{directory} cannot be loaded by transformers: {_reason(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise NblError(f"{directory} lacks the weights {missing[0]} and {len(missing) - 1} more; fetch the model again")
    return model.eval()


def load_tokenizer(directory: Path) -> Any:
    """The fast tokenizer of a checkpoint directory.

    Raises:
        NblError: there is none that transformers can load.
    """
    try:
        return tokenizer_of(directory)
    except NblError:
        raise
    except Exception as error:
        raise NblError(f"{directory} has no usable tokenizer: {error}") from error
