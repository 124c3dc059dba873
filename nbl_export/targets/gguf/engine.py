"""llama.cpp as an engine that runs GGUF files. It makes no decoders of a job; `convert` writes its files.

Runs a GGUF file with llama.cpp: the TextRunner of the engine.

Sizes of a decoder from its GGUF file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.graph.gguf.content import Content, read_content
from nbl_export.records.capabilities import Capabilities
from nbl_export.targets.base import Availability, DecoderFacts, Target, default_threads
from nbl_export.targets.gguf.node import Server
from nbl_export.targets.runners import SequenceLimits
from nbl_export.targets.tokenizer import Speaking, render

__all__ = ["LLAMA_CPP", "GgufFacts", "LlamaCppEngine", "LlamaCppRunner", "facts_of", "read_gguf_facts"]


class LlamaCppEngine(Target):
    """llama.cpp's CPU back end in node-llama-cpp."""

    capabilities = Capabilities(
        name="llama.cpp", title="llama.cpp", precisions=("keep",), sources={}, extra="", reads="gguf",
        cache_bytes={"keep": 2},
    )  # fmt: skip

    def probe(self) -> Availability:
        """Whether the library loads."""
        try:
            server = Server(None, 1)
        except NblError as error:
            return Availability(False, str(error))
        server.close()
        return Availability(True, ", ".join(f"{name} {version}" for name, version in server.versions.items()))

    def owns(self, path: Path) -> bool:
        """Whether the path is a GGUF file."""
        return path.suffix == ".gguf" and path.is_file()

    def facts(self, path: Path) -> DecoderFacts:
        """Sizes from the file's keys."""
        found = read_gguf_facts(path)
        return DecoderFacts(
            found.vocab_size, found.context_length, found.head_dim, found.cache_bytes_per_token, found.parameters
        )

    def arithmetic(self, path: Path) -> str:
        """The types that llama.cpp computes in."""
        return "the file's codes times 8-bit activations, with keys and values in float16"

    def open_runner(
        self, path: Path, threads: int | None = None, limits: SequenceLimits | None = None
    ) -> LlamaCppRunner:
        """A text runner on a GGUF file; `limits` has no effect."""
        return LlamaCppRunner(path, threads or default_threads())


LLAMA_CPP = LlamaCppEngine()


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


_CACHE_BYTES = 2  # llama.cpp keeps keys and values in float16 by default


@dataclass(frozen=True)
class GgufFacts:
    """What a comparison needs to know of a file."""

    vocab_size: int
    context_length: int
    cache_bytes_per_token: int
    cache_layers: int
    parameters: int
    head_dim: int


def read_gguf_facts(path: Path) -> GgufFacts:
    """Sizes of a file.

    Raises:
        CorruptError: the file cannot be read, or lacks a size.
    """
    try:
        return facts_of(read_content(path))
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CorruptError(f"{path} does not state its sizes ({error}); convert it again") from error


def facts_of(content: Content) -> GgufFacts:
    """Sizes of a content. Layers without key/value heads have no cache."""
    layers = content.num_layers
    heads = _each(content.get("attention.head_count"), layers)
    pairs = _each(content.get("attention.head_count_kv", content.get("attention.head_count")), layers)
    head = int(content.get("attention.key_length") or content.get("embedding_length") // max(heads))
    return GgufFacts(
        vocab_size=content.by_name["token_embd.weight"].shape[0],
        context_length=int(content.get("context_length")),
        cache_bytes_per_token=2 * sum(pairs) * head * _CACHE_BYTES,
        cache_layers=sum(1 for n in pairs if n),
        parameters=sum(math.prod(t.shape) for t in content.tensors),
        head_dim=head,
    )


def _each(value: int | list[int], layers: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list) else [int(value)] * layers
