"""Mixes several calibration texts with weights into one text, of which every prefix has the mix.

    --calibration a.txt:2 --calibration b.jsonl.gz        twice as many characters of a.txt as of b.jsonl.gz
    --calibration a.txt:2,b.jsonl.gz:1                    the same
    --calibration org/name@split                          a hub dataset

If a file of exactly the given name exists, colons and commas are part of the name. Each document is taken from the text
that is furthest behind its weight, so the shares hold at every point, up to one document. The mix ends with the first
text that ends, since the shares would not hold beyond this point.

A run directory keeps documents of hub datasets. Later stages and reruns read them, and not the hub:

    calibration.jsonl.gz          {"source": "org/name@split", "text": "one document"} a line
    nbl.json: calibration.hub     source -> SHA-256 and characters of its documents, and whether the dataset goes on

The file is complete or not there, and equal documents give equal bytes. The datasets of the recorded run stay in the
file until a calibration with other datasets is finished, so an interrupted change of text harms nothing.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError, UsageError
from nbl_export.files import replacing
from nbl_export.text.corpus import (
    READ_BYTES,
    Text,
    TextPart,
    cut_documents,
    documents_sha256,
    hub_texts,
    installed_text,
    read_text,
)
from nbl_export.text.hub import HubError, unavailable

__all__ = [
    "HUB_MIX",
    "HubTexts",
    "WeightedSource",
    "absolute_sources",
    "default_text",
    "mix",
    "parse_sources",
    "read_texts",
]

# Web text, program text and chat: the default, in equal shares of characters.
HUB_MIX = (
    "allenai/c4/en@train", "codeparrot/codeparrot-clean-valid@train", "HuggingFaceH4/ultrachat_200k@train_sft",
)  # fmt: skip
_HUB_MIX_CHARS = 2_000_000  # of each: 350,000 tokens to calibrate, to judge and to distill on, several times over
_HUB_MIX_SECONDS = 60.0


_LINE_BYTES = 1024  # of a line beside its text
_ESCAPE_BYTES = 6  # most bytes of a character in JSON
_ADVICE = "restore it, or start over with --force"


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


def read_texts(values: Sequence[str], hub: HubTexts | None = None) -> Text:
    """The text that --calibration names; the default text for no values.

    Args:
        hub: reads hub datasets, and knows the datasets that a run directory keeps.

    Raises:
        NblError: a text is missing, empty, binary, not UTF-8, or without a text field.
    """
    hub = hub or HubTexts()
    sources = parse_sources(values)
    if not sources:
        return default_text(hub)
    texts = [read_text(source.source, hub.read_one) for source in sources]
    return texts[0] if len(texts) == 1 else mix(texts, [source.weight for source in sources])


def default_text(hub: HubTexts) -> Text:
    """The mix of `HUB_MIX`, or installed text if the hub cannot be read. A run keeps to what it began with.

    Raises:
        CorruptError: the run directory does not hold the texts that it should keep.
    """
    if not hub.keeps(HUB_MIX):
        reason = "this run began without the hub (--force starts over)" if hub.began_installed else unavailable()
        if reason:
            return installed_text(reason)
    try:
        texts = hub.read(HUB_MIX, _HUB_MIX_CHARS, _HUB_MIX_SECONDS)
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


class HubTexts:
    """Texts of hub datasets for one run: from the kept file if it has them, else from the hub.

    path: the kept file of the run directory; None keeps nothing. manifest: of the run directory, empty for a new one.
    say: gets a line before the hub is read.
    """

    def __init__(
        self,
        path: Path | None = None,
        manifest: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        manifest = manifest or {}
        self._path, self._say = path, say
        self._recorded: dict[str, Any] = dict(manifest.get("calibration", {}).get("hub", {}))
        self._needed = bool(manifest.get("stages"))
        self.began_installed = bool(manifest) and not self._recorded and not manifest["options"]["calibration"]
        self._kept: dict[str, Text] | None = None
        self._used: dict[str, Text] = {}

    def keeps(self, sources: Iterable[str]) -> bool:
        """Whether the run directory keeps all these datasets.

        Raises:
            CorruptError: a finished stage has read the kept file, which is now missing or damaged.
        """
        return set(sources) <= self._recorded.keys() and set(sources) <= self._load().keys()

    def read(self, sources: Sequence[str], most: int | None = None, seconds: float | None = None) -> list[Text]:
        """Kept texts, or texts from the hub; arguments and errors as for `corpus.hub_texts`, and CorruptError."""
        kept = self._load() if self._recorded.keys() & set(sources) else {}
        missing = [source for source in sources if source not in kept]
        if missing:
            self._say(f"  reading from the hub: {', '.join(missing)}")
            kept = {**kept, **dict(zip(missing, hub_texts(missing, most, seconds), strict=True))}
        self._used.update({source: kept[source] for source in sources})
        return [kept[source] for source in sources]

    def read_one(self, source: str) -> Text:
        """`read` for one dataset."""
        return self.read([source])[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest records of the datasets that were read."""
        return {
            source: {"sha256": text.sha256, "characters": sum(map(len, text.documents)), "cut": text.cut}
            for source, text in self._used.items()
        }

    def save(self) -> None:
        """Keep the datasets that were read, beside the datasets that the manifest on disk records."""
        kept = self._load() if self._used else {}
        if self._path is not None and not self._used.keys() <= kept.keys():
            _write({**kept, **self._used}, self._path)

    def _load(self) -> dict[str, Text]:
        """The kept texts. An unreadable file counts as empty before the first finished stage."""
        if self._kept is None:
            try:
                self._kept = _read(self._path, self._recorded) if self._path and self._recorded else {}
            except CorruptError:
                if self._needed:
                    raise
                self._kept = {}
        return self._kept


def _write(texts: Mapping[str, Text], path: Path) -> None:
    """Write a kept file, completely or not at all; nothing for no texts."""
    if not texts:
        return
    with replacing(path) as stream, gzip.GzipFile("", "wb", fileobj=stream, mtime=0) as packed:
        for source in sorted(texts):
            for document in texts[source].documents:
                packed.write(json.dumps({"source": source, "text": document}).encode() + b"\n")


def _read(path: Path, recorded: Mapping[str, Any]) -> dict[str, Text]:
    """The recorded texts of a kept file; further texts in it are left out.

    Raises:
        CorruptError: the file is missing, or its documents are not the recorded documents.
    """
    try:
        documents: dict[str, list[str]] = {source: [] for source in recorded}
        left = {source: min(facts["characters"], READ_BYTES) for source, facts in recorded.items()}
        for line in _lines(path):
            source, text = line["source"], line["text"]
            if source in recorded:
                left[source] -= len(text)
                documents[source].append(text)
                if left[source] < 0:
                    raise ValueError(f"more text of {source} than recorded")
        for source, facts in recorded.items():
            if documents_sha256(documents[source]) != facts["sha256"]:
                raise ValueError(f"the hash of {source} is not the recorded one")
        return {s: Text(s, facts["sha256"], tuple(documents[s]), cut=facts["cut"]) for s, facts in recorded.items()}
    except FileNotFoundError as error:
        raise CorruptError(f"{path}, the calibration text, is missing; {_ADVICE}") from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path}, the calibration text, is damaged ({error}); {_ADVICE}") from error


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file():  # a pipe would wait
        raise FileNotFoundError(path)
    longest = _ESCAPE_BYTES * READ_BYTES + _LINE_BYTES
    with gzip.open(path, "rb") as stream:
        while line := stream.readline(longest):
            yield json.loads(line)
