"""Text and token ids by the tokenizer files of a directory, and its continuation; no torch, no transformers.

The `tokenizers` package reads tokenizer.json. `jinja2` renders the chat template as transformers does
(`apply_chat_template`), in a sandbox and in a process with limits.

A template is a program: it can repeat a text, or loop, for ever. So a process of its own renders it, which may take
half a gigabyte of memory and ten seconds. The values are: messages, add_generation_prompt, the special tokens,
raise_exception and strftime_now.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nbl_export.child import Child, Write
from nbl_export.errors import MissingPackageError, NblError
from nbl_export.files import read_json, read_small
from nbl_export.targets.runners import TextRunner
from nbl_export.trust.contained import check_folder
from nbl_export.trust.model_settings import read_text

__all__ = ["TOKENIZER", "TextGenerationMixin", "TokenizerFiles", "applied", "read_settings", "render"]


TOKENIZER = "tokenizer.json"
_Own = TypeVar("_Own", bound="TextGenerationMixin")


class TokenizerFiles:
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
            raise MissingPackageError("tokenizers", "cpu", "reading and writing text") from error
        check_folder(directory)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(read_small(directory / TOKENIZER, _MOST_TOKENIZER))
        except Exception as error:  # the package raises plain Exception
            raise NblError(f"the tokenizer of {directory} does not load: {error}; export again") from error
        self._tokenizers = tokenizers
        read_settings(directory / "tokenizer_config.json")
        self.end_ids = _end_ids(directory)

    def asked(self, prompt: str) -> list[int] | None:
        """Token ids of a user's turn in the chat template; None without a template."""
        text = applied(self.directory, prompt)
        return None if text is None else list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt; with `chat` and a template in the directory, the prompt is the user's turn in it.

        A template writes its own begin-of-text, so only a plain prompt gets special tokens.
        """
        found = self.asked(prompt) if chat else None
        return list(self._tokenizer.encode(prompt, add_special_tokens=True).ids) if found is None else found

    def whole(self, tokens: Sequence[int]) -> str:
        """Text of tokens without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def behind(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """Text that tokens add to a prompt, until an end-of-text id."""
        answer = list(itertools.takewhile(lambda token: token not in self.end_ids, tokens))
        return self.whole([*prompt, *answer]).removeprefix(self.whole(prompt))

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Text of tokens as they come, until an end-of-text id; a character of several tokens comes out whole."""
        stream = self._tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        for token in tokens:
            if token in self.end_ids:
                return
            if piece := stream.step(self._tokenizer, token):
                yield piece


class TextGenerationMixin(TextRunner):
    """A runner that reads and writes text with the tokenizer of its directory.

    Attributes:
        context_length: tokens of the longest text, the answer included.
        advice: what a user can do about this limit, beside a shorter prompt.
    """

    directory: Path
    context_length: int
    advice = ""

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model; the runner cannot be used afterwards."""

    @functools.cached_property
    def text(self) -> TokenizerFiles:
        """The tokenizer of the directory."""
        return TokenizerFiles(self.directory)

    def last_logits(self) -> np.ndarray:
        """Logits [V] float32 after the last token; valid only right after `append`."""
        raise NotImplementedError

    def pick(self) -> int:
        """The most likely next token."""
        return int(self.last_logits().argmax())

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
        """The tokens of `greedy` as they come.

        Raises:
            NblError: the prompt is empty, or leaves no room for an answer.
        """
        if not len(ids):
            raise NblError("the prompt is empty: give at least one word")
        room = self.context_length - len(ids)
        if room <= 0:
            raise NblError(
                f"the prompt has {len(ids)} tokens and {self.directory} takes {self.context_length}, the answer "
                f"included: shorten the prompt{self.advice}"
            )
        self.begin(len(ids) + new_tokens)
        chunk: Sequence[int] = ids
        for _ in range(min(new_tokens, room)):
            self.append(chunk)
            chunk = [self.pick()]
            yield chunk[0]

    def check_room(self, length: int, capacity: int) -> None:
        """Refuse a sequence that would outgrow what `begin` reserved.

        Raises:
            NblError: `length` tokens are more than `capacity`.
        """
        if length > capacity:
            raise NblError(
                f"{length} tokens do not fit into {self.directory}: room for {capacity} (its context is "
                f"{self.context_length}); use a shorter prompt{self.advice}"
            )


def _end_ids(directory: Path) -> tuple[int, ...]:
    """The ids that end a text; generation_config.json takes precedence over config.json."""
    for name in ("generation_config.json", "config.json"):
        end = read_settings(directory / name).get("eos_token_id")
        if end is not None:
            ids = end if isinstance(end, list) else [end]
            if not all(type(i) is int for i in ids):
                raise NblError(f"{directory / name} has an eos_token_id that is no number of a token; export again")
            return tuple(ids)
    return ()


_MOST_TOKENIZER = 1 << 28  # bytes; that of a large vocabulary has 33 MB
_MOST_BYTES = 512 << 20  # of memory, beyond what the process takes before it renders
_MOST_CHARACTERS = 16 << 20  # of the text
_SECONDS = 10.0
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def applied(directory: Path, prompt: str) -> str | None:
    """The text of one user's turn in the template of a model directory; None without a template.

    Raises:
        NblError: the template cannot be applied, or a file is damaged.
    """
    settings = read_settings(directory / "tokenizer_config.json")
    path = directory / "chat_template.jinja"
    template = read_text(path) if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):  # of several, by name
        template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), "")
    if not isinstance(template, str) or not template:
        return None
    found = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
    special = {name: str(v["content"]) if isinstance(v, dict) else str(v) for name, v in found.items()}
    return render(template, prompt, special, directory)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory; empty without the file.

    Raises:
        NblError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except (OSError, ValueError) as error:
        raise NblError(f"{path} cannot be read ({error}); export again") from error
    return value if isinstance(value, dict) else {}


def render(template: str, prompt: str, special: Mapping[str, str], where: object) -> str:
    """The text of one user's turn.

    Args:
        special: bos_token, eos_token, ...
        where: the model, for the message.

    Raises:
        NblError: the template cannot be applied within the limits.
    """
    reason = f"it needs more than {_MOST_BYTES >> 20} MiB of memory"
    with Child(_render, template, prompt, dict(special), grace=0.0) as child:
        try:
            answer = child.answer(_SECONDS)
        except TimeoutError:
            answer = None
            reason = f"it does not end within {_SECONDS:.0f} s"
    kind, text = answer if answer is not None else ("error", reason)
    if kind == "error":
        raise NblError(f"the chat template of {where} cannot be applied ({text}); try without it (--raw)")
    return str(text)


def _render(write: Write, template: str, prompt: str, special: dict[str, str]) -> None:
    """Send the text, or why there is none."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    messages = [{"role": "user", "content": prompt}]
    _limit()
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **special)
        if len(text) > _MOST_CHARACTERS:
            raise ValueError(f"its text has more than {_MOST_CHARACTERS >> 20} Mi characters")
        write(["text", text])
    except MemoryError:
        write(["error", f"it needs more than {_MOST_BYTES >> 20} MiB of memory"])
    except Exception as error:  # a template can raise anything
        write(["error", " ".join(str(error).split())[:500]])


def _limit() -> None:
    """Let this process take `_MOST_BYTES` more address space."""
    import resource

    import psutil

    most = psutil.Process().memory_info().vms + _MOST_BYTES
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
