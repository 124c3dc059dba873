"""Which part of the calibration text one run collects: `--shard i/n`.

The text is cut into batches of windows, which do not depend on n. Shard i of n takes every n-th batch, beginning with
the i-th. So every shard sees the whole mix, shards are disjoint, and all shards together are the unsharded text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbl_export.errors import NblError, UsageError

__all__ = ["Shard", "parse_shard"]


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 1) of `of`."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def batches(self, total: int) -> list[int]:
        """The batches of this shard, ascending, from 0.

        Raises:
            NblError: there are more shards than batches.
        """
        if self.of > total:
            raise NblError(
                f"--shard {self}: the text makes {total} batch{'es' * (total != 1)} only; use at most {total} "
                f"shard{'s' * (total != 1)}, or more --calibration-tokens"
            )
        return list(range(self.number - 1, total, self.of))


def parse_shard(text: str | None) -> Shard:
    """Read "i/n"; None means the whole text.

    Raises:
        UsageError: the text has another form, or i is not among 1..n.
    """
    if text is None:
        return Shard()
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if not match:
        raise UsageError(f"--shard {text!r} is not i/n: write 2/4 for the second of four")
    shard = Shard(int(match[1]), int(match[2]))
    if not 1 <= shard.number <= shard.of:
        raise UsageError(f"--shard {text}: shards are counted from 1 to n; {shard.number} is not among 1 to {shard.of}")
    return shard
