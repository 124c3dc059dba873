"""Text and token ids by the tokenizer files of a directory, and its continuation; no torch, no transformers.

The `tokenizers` package reads tokenizer.json. `chat_template` renders the chat template.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nbl_export.errors import MissingPackageError, NblError
from nbl_export.targets.chat_template import applied, read_settings
from nbl_export.targets.runners import TextRunner
from nbl_export.trust.contained import check_folder

__all__ = ["Speaking", "Text", "continued"]


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


class Speaking(TextRunner):
    """A runner that reads and writes text with the tokenizer of its directory.

    Attributes:
        context_length: tokens of the longest text, the answer included.
        advice: what a user can do about this limit, beside a shorter prompt.
    """

    directory: Path
    context_length: int
    advice = ""

    @functools.cached_property
    def text(self) -> Text:
        """The tokenizer of the directory."""
        return Text(self.directory)

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt, through the chat template if there is one and `chat` asks for it."""
        return self.text.encode(prompt, chat=chat)

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text, the limit or the end of the context."""
        return self.text.pieces(self.continuation(ids, max_new_tokens))

    def greedy(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy continuation as token ids; ignores the end of text, and ends early at the end of the context."""
        return list(self.continuation(ids, new_tokens))

    def continuation(self, ids: Sequence[int], new_tokens: int) -> Iterator[int]:
        """The tokens of `greedy` as they come."""
        return continued(self, self.directory, ids, new_tokens, self.context_length, self.advice)


def continued(
    runner: TextRunner, directory: Path, ids: Sequence[int], new_tokens: int, limit: int, advice: str = ""
) -> Iterator[int]:
    """Token ids behind a prompt, until `new_tokens` or until prompt and answer have `limit` tokens.

    Args:
        advice: what a user can do about the limit, beside a shorter prompt.

    Raises:
        NblError: the prompt is empty, or leaves no room for an answer.
    """
    if not len(ids):
        raise NblError("the prompt is empty: give at least one word")
    if len(ids) >= limit:
        raise NblError(
            f"the prompt has {len(ids)} tokens and {directory} takes {limit}, the answer included: "
            f"shorten the prompt{advice}"
        )
    runner.begin(len(ids) + new_tokens)
    chunk: Sequence[int] = ids
    for _ in range(min(new_tokens, limit - len(ids))):
        runner.append(chunk)
        chunk = [runner.pick()]
        yield chunk[0]


def _end_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a text; generation_config.json takes precedence over config.json."""
    for name in ("generation_config.json", "config.json"):
        end = read_settings(directory / name).get("eos_token_id")
        if end is not None:
            return tuple(int(i) for i in (end if isinstance(end, list) else [end]))
    return ()
