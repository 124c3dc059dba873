"""Mixes several calibration texts into one text, of which every prefix has equal shares of characters.

    --calibration a.txt --calibration b.jsonl.gz          as many characters of a.txt as of b.jsonl.gz
    --calibration org/name@split                          a hub dataset

Each document is taken from the text of which least was taken, so the shares hold at every point, up to one document.
The mix ends with the first text that ends, since the shares would not hold beyond this point.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from nbl_export.errors import NblError, UsageError
from nbl_export.files import file_sha256
from nbl_export.text.corpus import Corpus, CorpusPart, find, hub_texts, installed_text, read_text, split_documents
from nbl_export.text.hub import HubError, unavailable

__all__ = ["HUB_MIX", "absolute_sources", "default_text", "identify", "mix", "read_texts"]

# Web text, program text and chat: the default, in equal shares of characters.
HUB_MIX = (
    "allenai/c4/en@train", "codeparrot/codeparrot-clean-valid@train", "HuggingFaceH4/ultrachat_200k@train_sft",
)  # fmt: skip
_HUB_MIX_CHARS = 2_000_000  # of each: 350,000 tokens to calibrate, to judge and to distill on, several times over
_HUB_MIX_SECONDS = 60.0


def absolute_sources(values: Sequence[str]) -> list[str]:
    """The values with absolute local paths, which are valid in any working directory."""
    local = [(value, Path(value).expanduser()) for value in values]
    return [str(path.absolute()) if path.exists() else value for value, path in local]


def identify(values: Sequence[str]) -> list[str]:
    """What says that texts are the same without reading the hub: SHA-256 of a file or id of a dataset.

    Empty for the default text.

    Raises:
        NblError: a value is neither a readable file nor a hub id, or is given twice.
    """
    for value in values:
        if not value.strip():
            raise UsageError("--calibration: the name of a text is empty")
        if values.count(value) > 1:
            raise UsageError(f"--calibration: {value} is given twice; give it once")
    found = [(find(value), value) for value in values]
    try:
        return [value if file is None else file_sha256(file) for file, value in found]
    except OSError as error:
        raise NblError(f"calibration text {error.filename} cannot be read: {error.strerror}") from error


def read_texts(values: Sequence[str], say: Callable[[str], None] = lambda _line: None) -> Corpus:
    """The text that --calibration names; the default text for no values.

    Args:
        say: gets a line before the hub is read.

    Raises:
        NblError: a text is missing, empty, binary, not UTF-8, or without a text field.
    """
    if not values:
        return default_text(say)
    if asked := [value for value in values if find(value) is None]:
        say(f"  reading from the hub: {', '.join(asked)}")
    texts = [read_text(value) for value in values]
    return texts[0] if len(texts) == 1 else mix(texts)


def default_text(say: Callable[[str], None] = lambda _line: None) -> Corpus:
    """The mix of `HUB_MIX`, or installed text if the hub cannot be read."""
    if reason := unavailable():
        return installed_text(reason)
    say(f"  reading from the hub: {', '.join(HUB_MIX)}")
    try:
        texts = hub_texts(HUB_MIX, _HUB_MIX_CHARS, _HUB_MIX_SECONDS)
    except HubError as error:
        return installed_text(f"hub dataset {error.source} cannot be read ({error.reason})", failed=True)
    names = (source.partition("@")[0] for source in HUB_MIX)
    return dataclasses.replace(mix(texts), name=f"hub mix: {', '.join(names)}")


def mix(texts: Sequence[Corpus]) -> Corpus:
    """One text of several; long documents are split at line ends, so that they can be mixed."""
    parts = tuple(CorpusPart(text.name, text.sha256) for text in texts)
    digest = hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest()
    documents, ended = _interleave([split_documents(text.documents) for text in texts])
    name = " + ".join(part.name for part in parts)
    return Corpus(name, digest, tuple(documents), parts, texts[ended].name, texts[ended].truncated)


def _interleave(streams: Sequence[Sequence[str]]) -> tuple[list[str], int]:
    """Documents, each from the stream of which least was taken, and the index of the stream that ended first."""
    rest = [iter(stream) for stream in streams]
    used = [0] * len(streams)
    taken: list[str] = []
    while True:
        behind = min(range(len(streams)), key=lambda k: (used[k], k))
        document = next(rest[behind], None)
        if document is None:
            return taken, behind
        used[behind] += max(1, len(document))
        taken.append(document)
