"""Documents of hub datasets that a run directory keeps: later stages and reruns read them, and not the hub.

    calibration.jsonl.gz          {"source": "org/name@split", "text": "one document"} a line
    nbl.json: calibration.hub     source -> SHA-256 and characters of its documents, and whether the dataset goes on

The file is complete or not there, and equal documents give equal bytes. The datasets of the recorded run stay in the
file until a calibration with other datasets is finished, so an interrupted change of text harms nothing.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import CorruptError
from nbl_export.files import replacing
from nbl_export.text.corpus import READ_BYTES, Text, documents_sha256, hub_texts

__all__ = ["HubTexts"]

_LINE_BYTES = 1024  # of a line beside its text
_ESCAPE_BYTES = 6  # most bytes of a character in JSON


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


_ADVICE = "restore it, or start over with --force"


def _lines(path: Path) -> Iterator[Any]:
    if not path.is_file():  # a pipe would wait
        raise FileNotFoundError(path)
    longest = _ESCAPE_BYTES * READ_BYTES + _LINE_BYTES
    with gzip.open(path, "rb") as stream:
        while line := stream.readline(longest):
            yield json.loads(line)
