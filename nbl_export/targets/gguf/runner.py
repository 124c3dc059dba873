"""Runs a GGUF file with llama.cpp: the TextRunner of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nbl_export.errors import NblError
from nbl_export.gguf_format.content import read_content
from nbl_export.targets.chat_template import render
from nbl_export.targets.gguf.facts import facts_of
from nbl_export.targets.gguf.node import Server
from nbl_export.targets.tokenizer import Speaking

__all__ = ["LlamaCppRunner"]

_IDS = "tokenizer.ggml.{}_token_id"
_ENDS = ("eos", "eot")


class LlamaCppRunner(Speaking):
    """A loaded GGUF file, one sequence.

    Raises:
        NblError: node-llama-cpp is missing, or the file does not load.
    """

    def __init__(self, path: Path, threads: int) -> None:
        content = read_content(path)
        self.directory, self.context_length = path, facts_of(content).context_length
        self._keys = {name: key.value for name, key in content.keys.items() if not isinstance(key.value, list)}
        tokens = content.keys.get("tokenizer.ggml.tokens")
        self._tokens = [] if tokens is None else tokens.value
        self.server = Server(path, threads)
        self._best = 0

    def __enter__(self) -> LlamaCppRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        """Free the model; the runner cannot be used afterwards."""
        self.server.close()

    def begin(self, max_tokens: int, batch: int = 1) -> None:
        """Forget the sequence; make room for max_tokens.

        Raises:
            NblError: `batch` is not 1.
        """
        if batch != 1:
            raise NblError("llama.cpp is measured on one sequence: leave --batch out")
        self.server.ask("begin", tokens=min(max_tokens, self.context_length))

    def append(self, ids: Sequence[int]) -> None:
        """Run the decoder over ids as one chunk."""
        self._best = int(self.server.ask("append", ids=[int(i) for i in ids])["best"])

    def rewind(self, length: int) -> None:
        """Drop everything after the first `length` tokens."""
        self.server.ask("rewind", length=length)

    def pick(self) -> int:
        """The most likely next token."""
        return self._best

    def encode(self, prompt: str, *, chat: bool) -> list[int]:
        """Token ids of a prompt; with `chat` and a template in the file, the prompt is the user's turn in it."""
        template = self._keys.get("tokenizer.chat_template") if chat else None
        if template is not None:
            names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
            special = {n: self._tokens[self._keys[_IDS.format(k)]] for n, k in names.items()
                       if _IDS.format(k) in self._keys}  # fmt: skip
            return self._ids(render(str(template), prompt, special, self.directory))
        begin = self._keys.get(_IDS.format("bos")) if self._keys.get("tokenizer.ggml.add_bos_token") else None
        return [*([] if begin is None else [int(begin)]), *self._ids(prompt)]

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self.server.ask("encode", text=text)["ids"]]

    def stream(self, ids: Sequence[int], max_new_tokens: int) -> Iterator[str]:
        """Greedy continuation as text pieces, until the end of text, the limit or the end of the context."""
        ends = {self._keys.get(_IDS.format(name)) for name in _ENDS}
        found: list[int] = []
        said = ""
        for token in self.continuation(ids, max_new_tokens):
            if token in ends:
                return
            found.append(token)
            text = str(self.server.ask("decode", ids=found)["text"])
            if not text.endswith("\ufffd"):  # a character of several tokens comes out whole
                yield text[len(said) :]
                said = text

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Natural logarithms [T - 1] of the probabilities of ids[1:], and the likeliest ids [T - 1] in their places."""
        self.begin(len(ids))
        found = self.server.ask("score", ids=[int(i) for i in ids])
        return np.asarray(found["logs"], np.float64), np.asarray(found["best"], np.int64)
