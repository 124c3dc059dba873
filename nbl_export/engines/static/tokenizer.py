"""Converts text to token ids and back, with the tokenizer files of a directory; no torch, no transformers.

The `tokenizers` package reads tokenizer.json. jinja2 renders the chat template with the values that transformers gives
it (`apply_chat_template`): messages, add_generation_prompt, the special tokens, raise_exception.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.trust.contained import refuse_links_out

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
        refuse_links_out(directory)
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
        text = prompt if template is None else self._render(template, prompt)
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

    def _render(self, template: str, prompt: str) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
        messages = [{"role": "user", "content": prompt}]
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, **self._special_tokens()
            )
        except Exception as error:  # a template can raise anything
            raise NblError(
                f"the chat template of {self.directory} cannot be applied ({error}); try without it (--raw)"
            ) from error

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
