"""Checks the settings of a checkpoint that transformers, tokenizers and ONNX Runtime GenAI act on.

    config.json             no weights under another name, no code from the hub for attention or quantisation
    tokenizer_config.json   no file of this machine outside the folder
    adapter_config.json     refused: it makes libraries load another model from anywhere

Numbers by which libraries make lists, tables and modules before they read a weight are checked too:

    config.json             num_hidden_layers: at most the layers of the tensors; num_labels: transformers names each
    GGUF                    block_count, like num_hidden_layers
    tokenizer_config.json   extra_ids, offset, ids of added tokens: transformers makes each token up to them

`auto_map` and the code beside it have no effect: every call passes trust_remote_code=False (`pretrained`). No folder
that is written names code of a stranger (`drop_code`): its user may have to trust code that is ours.

JSON objects are read so that this tool and any library understand a file in the same way. Refused are a name that
occurs twice (libraries differ in which value they take), numbers that JSON does not have, nesting that crashes a
parser, and a file larger than any real file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, one_line
from nbl_export.files import SMALL_BYTES, read_json, read_small, write_json
from nbl_export.records.decoder import MOST_LAYERS
from nbl_export.trust.contained import check_folder, is_inside

__all__ = [
    "CONFIG_BYTES",
    "check_checkpoint",
    "check_layers",
    "check_tokenizer_settings",
    "drop_code",
    "read_object",
    "read_text",
]

CONFIG_BYTES = 8 << 20
_MOST_BYTES = {"config.json": CONFIG_BYTES, "generation_config.json": 1 << 20, "tokenizer_config.json": 64 << 20}
# Texts that libraries read whole, and the most bytes of one. A large vocabulary, Gemma's, takes 33 MB.
_WHOLE = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("*.jinja", "additional_chat_templates/*")
_MOST_TEXTS = {**dict.fromkeys(_WHOLE, 1 << 28), **dict.fromkeys(_TEMPLATES, SMALL_BYTES)}
_ATTENTION = ("attn_implementation", "experts_implementation")  # inside the name of a key
_ATTENTIONS = ("eager", "sdpa", None)  # others are packages, or kernels that transformers fetches from the hub
_QUANTISED = ("gptq", "awq", "olive")  # `methods.checkpoint` reads these; others bring code, some from the hub
_SAVED_FROM = ("special_tokens_map_file", "name_or_path")  # where the tokenizer was saved; no library opens it
# Text of tokens may look like a path. No library opens it.
_TEXTS = ("chat_template", "added_tokens_decoder")
_TEXT_ENDS = ("_token", "_tokens")


_UNREAD_SETTINGS = ("processor_config.json", "preprocessor_config.json")  # of the same libraries
_CODE = ("auto_map", "custom_pipelines", "custom_generate")  # keys that name code
_OF_LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d{1,9})\.")  # in a checkpoint, in a GGUF file
_MOST = 1 << 16
_MOST_TOKENS = 1 << 22
_NO_COUNT = re.compile("max|len|_id$")  # in names of numbers that no library counts up to
_ADVICE = "fetch the model again, or export it again"


def check_checkpoint(directory: Path) -> None:
    """Check a folder that transformers will open: its entries, then its settings.

    Raises:
        CorruptError: an entry is a link out of the folder, a pipe, a socket or a device.
        NblError: a setting is refused; the message names it.
    """
    check_folder(directory)
    adapter = directory / "adapter_config.json"
    if adapter.exists():
        raise NblError(
            f"{adapter} makes libraries load another model, which is refused; merge the adapter into the "
            "model and use the result"
        )
    for name in ("config.json", "generation_config.json"):
        if (directory / name).is_file():
            _check_config(directory / name)
    check_tokenizer_settings(directory)


def _check_config(path: Path) -> None:
    config = read_object(path, _MOST_BYTES[path.name])
    for where in _values(config):
        if not isinstance(where, dict):
            continue
        _check_numbers(path, _MOST, [("num_labels", where.get("num_labels"))])
        _check_numbers(path, 1, [("partial_rotary_factor", where.get("partial_rotary_factor"))])
        if where.get("transformers_weights") is not None:
            raise _refused(path, "transformers_weights", "weights are read from model.safetensors or its index")
        for key in (key for key in where if any(part in key for part in _ATTENTION)):
            said = where[key]
            if any(value not in _ATTENTIONS for value in (said.values() if isinstance(said, dict) else [said])):
                raise _refused(path, key, f"{said!r} may be code from the hub")
        if where.get("configuration_files") is not None:
            raise _refused(path, "configuration_files", "libraries would read other settings than these")
        if where.get("custom_generate") is not None:
            raise _refused(path, "custom_generate", "it names code")
        quantised = where.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if quantised is not None and method not in _QUANTISED:
            raise _refused(path, "quantization_config", f"{method!r} is not {', '.join(_QUANTISED)}")


def _values(value: Any) -> Iterator[Any]:
    """A value and all values inside it."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        yield found
        if isinstance(found, dict | list):
            waiting.extend(found.values() if isinstance(found, dict) else found)


def _refused(path: Path, key: str, why: str) -> NblError:
    return NblError(f"{path} sets {key}, which is refused ({why}); remove the key if you trust the model")


def drop_code(directory: Path) -> None:
    """Remove the keys that name code from the settings in a folder that was written, at any depth.

    Raises:
        NblError: settings cannot be read.
    """
    for path in (path for name in (*_MOST_BYTES, *_UNREAD_SETTINGS) for path in directory.rglob(name)):
        settings = read_object(path, _MOST_BYTES["tokenizer_config.json"])
        coded = [found for found in _values(settings) if isinstance(found, dict) and not found.keys().isdisjoint(_CODE)]
        for found in coded:
            for key in _CODE:
                found.pop(key, None)
        if coded:
            write_json(path, settings)


def check_tokenizer_settings(directory: Path) -> None:
    """Check that files of a tokenizer are no larger than any, and that tokenizer_config.json names no file outside.

    Raises:
        NblError: a setting names a file of this machine outside the folder, options of a native parser, or a number
            larger than that of any tokenizer; or a file is larger than that of any tokenizer.
    """
    for pattern, most in _MOST_TEXTS.items():
        for file in directory.glob(pattern):
            if file.is_file() and file.stat().st_size > most:
                raise NblError(f"{file} is larger than {most >> 20} MiB, and libraries read it whole; {_ADVICE}")
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = read_object(path, _MOST_BYTES[path.name])
    _check_numbers(path, _MOST, ((key, value) for key, value in settings.items() if not _NO_COUNT.search(key)))
    if isinstance(added := settings.get("added_tokens_decoder"), dict):
        ids = (("added_tokens_decoder", int(number)) for number in added if number.strip().isdecimal())
        _check_numbers(path, _MOST_TOKENS, ids)
    for key, value in settings.items():
        if key in (*_SAVED_FROM, *_TEXTS) or key.endswith(_TEXT_ENDS):
            continue
        if any(_leads_out(found, directory) for found in _values(value)):
            raise _refused(path, key, "it names a file outside the folder")
    options = settings.get("sp_model_kwargs")
    if isinstance(options, dict) and any(isinstance(value, str) for value in options.values()):
        raise _refused(path, "sp_model_kwargs", "it may name files")


def _leads_out(value: Any, directory: Path) -> bool:
    """Whether a path names an existing file outside the folder; a path left from another machine does not exist.

    A tokenizer opens a mere name in the working directory. Many settings are words, so a directory counts for a path.
    """
    if not isinstance(value, str):
        return False
    exists = Path.is_file if Path(value).name == value else Path.exists
    for find in (lambda: directory / value, lambda: Path(value).expanduser()):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a valid path, or of no user
            if exists(place := find()) and not is_inside(place, directory):
                return True
    return False


def check_layers(stated: Any, names: Iterable[str], where: object) -> None:
    """Compare a stated number of layers with the names of tensors; a value that is no number is left to its reader.

    Raises:
        NblError: more layers are stated than tensors have, or more than any decoder has.
    """
    if not isinstance(stated, int):
        return
    held = len({match[1] for match in map(_OF_LAYER.search, names) if match})
    if stated > min(held, MOST_LAYERS):
        reason = f"its weights have {held}" if stated > held else f"at most {MOST_LAYERS} are read"
        raise NblError(f"{where} states {stated} layers, and {reason}; fetch the model again")


def _check_numbers(where: object, most: float, numbers: Iterable[tuple[str, Any]]) -> None:
    for key, value in numbers:
        if isinstance(value, int | float) and value > most:
            raise NblError(f"{where} sets {key} to {value:.12g}, and no decoder has as many; fetch the model again")


def read_object(path: Path, most_bytes: int = SMALL_BYTES) -> dict[str, Any]:
    """The object in a file.

    Raises:
        NblError: the file cannot be read, is larger than `most_bytes`, or is not one object with distinct names.
    """
    with _explained(path):
        found = read_json(path, most_bytes, object_pairs_hook=_distinct, parse_constant=_no_number)
        if not isinstance(found, dict):
            raise ValueError("it is not a model configuration, which is an object")
        return found


def read_text(path: Path, most_bytes: int = SMALL_BYTES) -> str:
    """The text of a small file.

    Raises:
        NblError: the file cannot be read, is larger than `most_bytes`, or is not UTF-8.
    """
    with _explained(path):
        return read_small(path, most_bytes).decode("utf-8")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise NblError(f"{path} cannot be read ({one_line(error)}); {_ADVICE}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
