"""Converts text to token ids and back, with the tokenizer files of a directory; no torch, no transformers.

The `tokenizers` package reads tokenizer.json. `chat_template` renders the chat template.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.targets.chat_template import applied, read_settings
from nbl_export.trust.contained import check_folder

__all__ = ["Text"]


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
        read_settings(directory / "tokenizer_config.json")
        self.end_ids = _end_ids(directory)

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt; with `chat` and a template in the directory, the prompt is the user's turn in it.

        A template writes its own begin-of-text, so only a plain prompt gets special tokens.
        """
        text = applied(self.directory, prompt) if chat else None
        found = self._tokenizer.encode(prompt if text is None else text, add_special_tokens=text is None)
        return [int(i) for i in found.ids]

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come, until an end-of-text id; a character of several tokens comes out whole."""
        stream = self._tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if token in self.end_ids:
                return
            if piece := stream.step(self._tokenizer, token):
                yield piece


def _end_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a text; generation_config.json takes precedence over config.json."""
    for name in ("generation_config.json", "config.json"):
        end = read_settings(directory / name).get("eos_token_id")
        if end is not None:
            return tuple(int(i) for i in (end if isinstance(end, list) else [end]))
    return ()
