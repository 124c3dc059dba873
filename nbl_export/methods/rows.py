"""What a layer reads of the decoder's streams, and which rows of each stream the last token needs.

    stream i    the residual stream that enters layer i, one row a token; stream N leaves the last of N layers
    row         of a token of this step: a prompt, a part of one, or one token

    a linear map          (Read(),)                                            its own row
    attention             (Read(rows=Rows.ALL),)                               all rows
    keys from stream c    (Read(rows=Rows.LAST, tokens=W), Read(c, Rows.ALL))  W rows at the end, and all of stream c

The cost model, tail pruning and the targets read `rows_needed` and do not ask for the kind of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["ATTENTION_READS", "Need", "Read", "Reads", "Rows", "continuing_tokens", "lowest_stream", "rows_needed"]


class Rows(Enum):
    """Which rows of a stream a layer reads.

    LAST: for each row that leaves, its own row; in all at least the last `tokens` rows of the step.
    ALL: every row.

    More than one row includes the first token of the step, an attention sink (`methods.predicted_kv.maps`).
    """

    LAST = "last"
    ALL = "all"


@dataclass(frozen=True)
class Read:
    """A stream that a layer reads.

    Attributes:
        stream: the stream that enters this layer; None for the layer's own input.
        tokens: number of rows, for LAST.
    """

    stream: int | None = None
    rows: Rows = Rows.LAST
    tokens: int = 1


Reads = tuple[Read, ...]
ATTENTION_READS: Reads = (Read(rows=Rows.ALL),)


@dataclass(frozen=True)
class Need:
    """Rows of a stream in one step: the last ones, and the first one if `first`.

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
        return Need(max(self.last, read.tokens), self.first or read.tokens > 1)


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


def lowest_stream(reads: Mapping[int, Reads]) -> int:
    """The lowest stream that some layers read; streams below it are as if these layers were attention."""
    return min(layer if read.stream is None else read.stream for layer, own in reads.items() for read in own)


def continuing_tokens(reads: Iterable[Reads]) -> int | None:
    """W, the tokens at the end of a step that leave the highest layers; None if every token of a step leaves them."""
    return max((own[0].tokens for own in reads if own[0].tokens > 1 or len(own) > 1), default=None)
