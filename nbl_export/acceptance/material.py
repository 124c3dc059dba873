"""acceptance.safetensors: what a verified decoder says of eight texts, for a machine with neither torch nor checkpoint.

    ids [8, T], lengths [8]                 tokens of the texts, padded with 0
    marks [8, 4]                            a text is appended in four steps, which end at these lengths
    {subject}.columns, .logits [8, 4, C]    after each step: ids of some tokens, the likeliest first, and their logits
    {subject}.last.columns, .last.logits [C]   `LAST_TOKENS` tokens in the last slots of an empty cache
    {subject}.cache.NAME [R, 2, Hkv, head]  of the first R texts: the cache's rows of the first and of the last token
    one.graph [bytes]                       the decoder up to its first attention, without weights; see `OneLayer`
    one.ids [n], one.hidden [n, D]          tokens, and the graph's output
    one.NAME [Hkv, n, head]                 the caches of these tokens
    metadata "acceptance", JSON: schema, precision, subjects, slots, limit

Logits, hidden values and caches are float32 and come from the float32 twin of the graph. Engines of other graphs lack
the last slots, the caches and the one layer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nbl_export.errors import CorruptError, NblError
from nbl_export.files import replacing

__all__ = ["CACHE_ROWS", "LAST_TOKENS", "STEPS_OF_A_TEXT", "Material", "OneLayer", "Texts", "load", "save"]

LAST_TOKENS = 4
CACHE_ROWS = 4  # texts whose cache rows are kept
STEPS_OF_A_TEXT = ("first chunk", "chunk of two tokens", "chunk behind a cache", "single token")
_SCHEMA = 1
_METADATA = "acceptance"
_ONE = "one."


@dataclass(frozen=True)
class Texts:
    """Tokens, and where the four steps of each text end."""

    ids: tuple[tuple[int, ...], ...]
    marks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class OneLayer:
    """The decoder of one subject, cut behind its first attention.

    Attributes:
        graph: an ONNX file without weights. The weights are in the data file beside the subject's decoder. The output
            called logits is the residual stream [B, T, D] behind the attention.
        expected: "hidden" [n, D], and caches [Hkv, n, head] by input name.
    """

    subject: str
    graph: bytes
    ids: tuple[int, ...]
    expected: dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """What the engine is compared with.

    Attributes:
        limit: largest rms of a difference over the rms of the expected values.
        slots: of a cache; 0 if caches grow.
        said: arrays by name, see the module; the names begin with a subject.
    """

    precision: str
    limit: float
    slots: int
    subjects: tuple[str, ...]
    texts: Texts
    said: dict[str, np.ndarray]
    one: OneLayer | None = None

    def of(self, subject: str, name: str) -> np.ndarray:
        """An array of a subject."""
        return self.said[f"{subject}.{name}"]

    def caches(self, subject: str) -> tuple[str, ...]:
        """Names of the caches whose rows are kept."""
        prefix = f"{subject}.cache."
        return tuple(sorted(name.removeprefix(prefix) for name in self.said if name.startswith(prefix)))


def save(material: Material, path: Path) -> None:
    """Write the file, complete or not at all."""
    from safetensors.numpy import save as serialised

    longest = max(map(len, material.texts.ids))
    arrays = {
        "ids": np.array([[*row, *[0] * (longest - len(row))] for row in material.texts.ids], np.int32),
        "lengths": np.array([len(row) for row in material.texts.ids], np.int32),
        "marks": np.array(material.texts.marks, np.int32),
        **material.said,
    }
    one = material.one
    if one is not None:
        arrays |= {f"{_ONE}{name}": array for name, array in one.expected.items()}
        arrays[f"{_ONE}graph"] = np.frombuffer(one.graph, np.uint8)
        arrays[f"{_ONE}ids"] = np.array(one.ids, np.int32)
    stated = {
        "schema": _SCHEMA, "precision": material.precision, "limit": material.limit, "slots": material.slots,
        "subjects": material.subjects, "one": None if one is None else one.subject,
    }  # fmt: skip
    metadata = {_METADATA: json.dumps(stated)}
    with replacing(path) as stream:
        stream.write(serialised({k: np.ascontiguousarray(v) for k, v in arrays.items()}, metadata=metadata))


def load(path: Path) -> Material:
    """Read the file.

    Raises:
        NblError: there is no file. CorruptError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise NblError(
            f"{path} is missing, which verification leaves for engines of a GPU: copy it from the machine that made "
            "the run, or run verification there again"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            stated = json.loads((file.metadata() or {})[_METADATA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if stated["schema"] != _SCHEMA:
            raise ValueError(f"schema {stated['schema']}, this version reads {_SCHEMA}")
        return _material(stated, arrays)
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise CorruptError(f"{path} cannot be read ({error}); copy it again, or verify again where it was made") from (
            error
        )


def _material(stated: dict[str, object], arrays: dict[str, np.ndarray]) -> Material:
    lengths, marks = arrays.pop("lengths").tolist(), arrays.pop("marks").tolist()
    ids = [row[:length] for row, length in zip(arrays.pop("ids").tolist(), lengths, strict=True)]
    own = {name.removeprefix(_ONE): arrays.pop(name) for name in list(arrays) if name.startswith(_ONE)}
    one = None
    if stated["one"] is not None:
        graph, tokens = own.pop("graph").tobytes(), own.pop("ids").tolist()
        one = OneLayer(str(stated["one"]), graph, tuple(tokens), own)
    subjects = stated["subjects"]
    if not isinstance(subjects, list):
        raise TypeError("'subjects' is of the wrong kind")
    texts = Texts(tuple(map(tuple, ids)), tuple(map(tuple, marks)))
    limit, slots = float(str(stated["limit"])), int(str(stated["slots"]))
    return Material(str(stated["precision"]), limit, slots, tuple(map(str, subjects)), texts, arrays, one)
