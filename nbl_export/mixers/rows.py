"""What a layer reads of the decoder's streams, and which rows of each stream the last token needs.

    stream i    the residual stream that enters layer i, one row a token; stream N leaves the last of N layers
    row         of a token of this step: a prompt, a part of one, or one token

    a linear map          (Read(),)                                            its own row
    a window of W         (Read(rows=Rows.WINDOW, tokens=W),)                  W rows up to its own, and the first
    attention             (Read(rows=Rows.ALL),)                               all rows
    keys from stream c    (Read(rows=Rows.LAST, tokens=W), Read(c, Rows.ALL))  W rows at the end, and all of stream c

The cost model, tail pruning and the targets read `rows_needed` and do not ask for the kind of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["ATTENTION_READS", "Need", "Read", "Reads", "Rows", "lowest_stream", "rows_needed",
           "rows_of_top"]  # fmt: skip


class Rows(Enum):
    """Which rows of a stream a layer reads.

    LAST: for each row that leaves, its own row; in all at least the last `tokens` rows of the step.
    WINDOW: for each row that leaves, the last `tokens` rows up to its own.
    ALL: every row.

    More than one row includes the first row of the text, which attention needs (`mixers.window`).
    """

    LAST = "last"
    WINDOW = "window"
    ALL = "all"


@dataclass(frozen=True)
class Read:
    """A stream that a layer reads.

    Attributes:
        stream: the stream that enters this layer; None for the layer's own input.
        tokens: number of rows, for LAST and WINDOW.
    """

    stream: int | None = None
    rows: Rows = Rows.LAST
    tokens: int = 1


Reads = tuple[Read, ...]
ATTENTION_READS: Reads = (Read(rows=Rows.ALL),)


@dataclass(frozen=True)
class Need:
    """Rows of a stream in one step: the last ones, and the first row of the text if `first`.

    Attributes:
        last: number of rows at the end; None for all rows.
    """

    last: int | None
    first: bool = False

    def count(self, tokens: int) -> int:
        """Number of rows in a step of so many tokens."""
        return tokens if self.last is None else min(tokens, self.last + self.first)

    def __or__(self, other: Need) -> Need:
        if self.last is None or other.last is None:
            return Need(None)
        return Need(max(self.last, other.last), self.first or other.first)

    def read_by(self, read: Read) -> Need:
        """Rows that a layer reads if these rows leave it."""
        if self.last is None or read.rows is Rows.ALL:
            return Need(None)
        last = max(self.last, read.tokens) if read.rows is Rows.LAST else self.last + read.tokens - 1
        return Need(last, self.first or read.rows is Rows.WINDOW or read.tokens > 1)


def rows_needed(reads: Mapping[int, Reads], layers: int) -> tuple[Need, ...]:
    """Rows of the streams 0 .. `layers` that the last row of the last stream follows from.

    Args:
        reads: of layers that are no plain attention.
    """
    needs = [Need(0)] * layers + [Need(1)]
    for layer in reversed(range(layers)):
        leaving = needs[layer + 1]
        needs[layer] |= leaving  # the residual stream
        for read in reads.get(layer, ATTENTION_READS):
            stream = layer if read.stream is None else read.stream
            needs[stream] |= leaving.read_by(read)
    return tuple(needs)


def rows_of_top(reads: Mapping[int, Reads]) -> dict[int, Need]:
    """Rows that enter these layers at the top of a decoder; each layer between and above them reads its own row."""
    if not reads:
        return {}
    top = max(reads) + 1
    needs = rows_needed({**dict.fromkeys(range(min(reads), top), (Read(),)), **reads}, top)
    return {layer: needs[layer] for layer in reads}


def lowest_stream(reads: Mapping[int, Reads]) -> int:
    """The lowest stream that some layers read; streams below it are as if these layers were attention."""
    return min(layer if read.stream is None else read.stream for layer, own in reads.items() for read in own)
