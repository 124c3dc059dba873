"""Converts text to token ids and back, with the tokenizer files of a directory; no torch, no transformers.

The `tokenizers` package reads tokenizer.json. `chat_template` renders the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nbl_export.engines.chat_template import render
from nbl_export.errors import MissingPackageError, NblError
from nbl_export.trust.contained import check_folder

__all__ = ["Text"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Text:
    """The tokenizer of a directory.

    Raises:
        MissingPackageError: tokenizers is not installed.
        NblError: a tokenizer file is missing or damaged, or a link leads out of the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            import tokenizers
        except ImportError as error:
            raise MissingPackageError("tokenizers", "trt-rtx", "reading and writing text") from error
        check_folder(directory)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the package raises plain Exception
            raise NblError(f"the tokenizer of {directory} does not load: {error}; export again") from error
        self._tokenizers = tokenizers
        self._settings = _read_json(directory / "tokenizer_config.json")
        self.end_ids = _end_ids(directory)

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt; with `chat` and a template in the directory, the prompt is the user's turn in it.

        A template writes its own begin-of-text, so only a plain prompt gets special tokens.
        """
        template = self._template() if chat else None
        text = prompt if template is None else render(template, prompt, self._special_tokens(), self.directory)
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=template is None).ids]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come, until an end-of-text id; a character of several tokens comes out whole."""
        stream = self._tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if token in self.end_ids:
                return
            if piece := stream.step(self._tokenizer, token):
                yield piece

    def _template(self) -> str | None:
        path = self.directory / "chat_template.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
        template = self._settings.get("chat_template")
        return template if isinstance(template, str) else None

    def _special_tokens(self) -> dict[str, str]:
        found = {name: self._settings.get(name) for name in _SPECIAL}
        return {name: v["content"] if isinstance(v, dict) else str(v) for name, v in found.items() if v is not None}


def _end_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a text; generation_config.json takes precedence over config.json."""
    for name in ("generation_config.json", "config.json"):
        end = _read_json(directory / name).get("eos_token_id")
        if end is not None:
            return tuple(int(i) for i in (end if isinstance(end, list) else [end]))
    return ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NblError(f"{path} cannot be read ({error}); export again") from error
    return value if isinstance(value, dict) else {}
