"""Mixes several calibration texts with weights into one text, of which every prefix has the mix.

    --calibration a.txt:2 --calibration b.jsonl.gz        twice as many characters of a.txt as of b.jsonl.gz
    --calibration a.txt:2,b.jsonl.gz:1                    the same
    --calibration org/name@split                          a hub dataset

If a file of exactly the given name exists, colons and commas are part of the name. Each document is taken from the text
that is furthest behind its weight, so the shares hold at every point, up to one document. The mix ends with the first
text that ends, since the shares would not hold beyond this point.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import NblError, UsageError
from nbl_export.files import file_sha256
from nbl_export.text.corpus import Text, TextPart, cut_documents, find, hub_texts, installed_text, read_text
from nbl_export.text.hub import HubError, unavailable

__all__ = ["HUB_MIX", "WeightedSource", "absolute_sources", "default_text", "identify", "mix", "parse_sources",
           "read_texts"]  # fmt: skip

# Web text, program text and chat: the default, in equal shares of characters.
HUB_MIX = (
    "allenai/c4/en@train", "codeparrot/codeparrot-clean-valid@train", "HuggingFaceH4/ultrachat_200k@train_sft",
)  # fmt: skip
_HUB_MIX_CHARS = 2_000_000  # of each: 350,000 tokens to calibrate, to judge and to distill on, several times over
_HUB_MIX_SECONDS = 60.0


@dataclass(frozen=True)
class WeightedSource:
    """A file or hub dataset id, and its weight among others."""

    source: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.source if self.weight == 1 else f"{self.source}:{self.weight:g}"


def parse_sources(values: Sequence[str]) -> tuple[WeightedSource, ...]:
    """Read the values of --calibration.

    Raises:
        UsageError: a weight is not above zero, a name is empty, or a text is given twice.
    """
    pieces = itertools.chain.from_iterable(
        [value] if Path(value).expanduser().exists() else value.split(",") for value in values
    )
    found = tuple(_parse(piece) for piece in pieces)
    for source in found:
        if sum(source.source == other.source for other in found) > 1:
            raise UsageError(f"--calibration: {source.source} is given twice; give it once, with a weight")
    return found


def _parse(piece: str) -> WeightedSource:
    match = re.fullmatch(r"(.+):([^:/]*)", piece, re.DOTALL)
    if match is None or Path(piece).expanduser().exists():
        if not piece.strip():
            raise UsageError("--calibration: the name of a text is empty")
        return WeightedSource(piece)
    try:
        weight = float(match[2])
    except ValueError:
        return WeightedSource(piece)  # a name with a colon in it
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"--calibration {piece}: a weight is a number above 0")
    return WeightedSource(match[1], weight)


def absolute_sources(values: Sequence[str]) -> list[str]:
    """The values with absolute local paths, which are valid in any working directory."""
    found = []
    for source in parse_sources(values):
        local = Path(source.source).expanduser()
        found.append(str(WeightedSource(str(local.absolute()), source.weight)) if local.exists() else str(source))
    return found


def identify(values: Sequence[str]) -> list[list[Any]]:
    """What says that texts are the same without reading the hub: SHA-256 of a file or id of a dataset, and weight.

    Empty for the default text.

    Raises:
        NblError: a value is neither a readable file nor a hub id.
    """
    found = [(find(source.source), source) for source in parse_sources(values)]
    try:
        return [[source.source if file is None else file_sha256(file), source.weight] for file, source in found]
    except OSError as error:
        raise NblError(f"calibration text {error.filename} cannot be read: {error.strerror}") from error


def read_texts(values: Sequence[str], say: Callable[[str], None] = lambda _line: None) -> Text:
    """The text that --calibration names; the default text for no values.

    Args:
        say: gets a line before the hub is read.

    Raises:
        NblError: a text is missing, empty, binary, not UTF-8, or without a text field.
    """
    sources = parse_sources(values)
    if not sources:
        return default_text(say)
    if asked := [source.source for source in sources if find(source.source) is None]:
        say(f"  reading from the hub: {', '.join(asked)}")
    texts = [read_text(source.source) for source in sources]
    return texts[0] if len(texts) == 1 else mix(texts, [source.weight for source in sources])


def default_text(say: Callable[[str], None] = lambda _line: None) -> Text:
    """The mix of `HUB_MIX`, or installed text if the hub cannot be read."""
    if reason := unavailable():
        return installed_text(reason)
    say(f"  reading from the hub: {', '.join(HUB_MIX)}")
    try:
        texts = hub_texts(HUB_MIX, _HUB_MIX_CHARS, _HUB_MIX_SECONDS)
    except HubError as error:
        return installed_text(f"hub dataset {error.source} cannot be read ({error.reason})", failed=True)
    names = (source.partition("@")[0] for source in HUB_MIX)
    return dataclasses.replace(mix(texts, [1.0] * len(texts)), name=f"hub mix: {', '.join(names)}")


def mix(texts: Sequence[Text], weights: Sequence[float]) -> Text:
    """One text of several; long documents are cut at line ends, so that they can be mixed."""
    parts = tuple(TextPart(text.name, text.sha256, weight) for text, weight in zip(texts, weights, strict=True))
    digest = hashlib.sha256("".join(f"{part.sha256}:{part.weight!r};" for part in parts).encode()).hexdigest()
    documents, ended = _interleave([cut_documents(text.documents) for text in texts], weights)
    name = " + ".join(str(WeightedSource(part.name, part.weight)) for part in parts)
    return Text(name, digest, tuple(documents), parts, texts[ended].name, texts[ended].cut)


def _interleave(streams: Sequence[Sequence[str]], weights: Sequence[float]) -> tuple[list[str], int]:
    """Documents, each from the stream that is furthest behind, and the index of the stream that ended first."""
    rest = [iter(stream) for stream in streams]
    used = [0.0] * len(streams)
    taken: list[str] = []
    while True:
        behind = min(range(len(streams)), key=lambda k: (used[k], k))
        document = next(rest[behind], None)
        if document is None:
            return taken, behind
        used[behind] += max(1, len(document)) / weights[behind]
        taken.append(document)
