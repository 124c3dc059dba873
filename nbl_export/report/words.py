"""Numbers as the report writes them; a dash for what was not measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "change",
    "duration",
    "listed",
    "milliseconds",
    "number",
    "numbers",
    "percent",
    "plural",
    "positions",
    "signed",
    "size",
    "task",
    "test",
    "with_stderr",
]


def number(value: float | None, missing: str = "–") -> str:
    """Three significant digits; whole from a thousand on."""
    if value is None:
        return missing
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 or value == 0 else f"{value:#.3g}".rstrip(".")


def numbers(counts: Sequence[int]) -> str:
    """Whole numbers in a sentence: "512, 1,024 and 2,048"."""
    said = [f"{count:,}" for count in counts]
    return " and ".join(filter(None, (", ".join(said[:-1]), said[-1])))


def with_stderr(found: Mapping[str, Any] | None) -> str:
    """A value with its standard error."""
    return f"{number(found['value'])}{_plus_minus(found['stderr'])}" if found else "–"


def signed(found: Mapping[str, Any] | None) -> str:
    """A difference with its sign and its standard error."""
    if not found:
        return "–"
    value = found["value"]
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(abs(value))}{_plus_minus(found['stderr'])}"


def task(row: Mapping[str, Any]) -> str:
    """A task of the harness, and the examples in its prompt if there are some."""
    shots = row.get("num_fewshot")
    return f"{row['task']}, {shots} {plural('example', shots)}" if shots else str(row["task"])


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {number(stderr)}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share)}%"


def size(count: float | None) -> str:
    """Bytes in the largest binary unit that leaves at least one."""
    if count is None:
        return "–"
    power = min(3, int(math.log2(max(count, 1))) // 10)
    return f"{number(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def duration(seconds: float | None) -> str:
    if seconds is None or seconds < 60:
        return "–" if seconds is None else f"{number(seconds)} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{number(1000 * seconds)} ms"


def change(before: float | None, after: float | None) -> str:
    """Percent from one to the other, with its sign."""
    return "–" if not before or after is None else f"{100 * (after / before - 1):+.1f}%".replace("-", "−")


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else f"{noun}s"


def listed(values: Sequence[object] | object) -> str:
    """The items of a list, or the one value."""
    return ", ".join(map(str, values)) if isinstance(values, (list, tuple)) else str(values)


def test(row: Mapping[str, Any]) -> str:
    """A test in words, of the report's rows, ratios or skipped tests: "prompt of 512 tokens behind 2,048"."""
    kind = row["test"][:2]
    count = row["test"][2:]
    if not (count.isascii() and count.isdigit()):
        return str(row["test"])
    tokens = int(count)
    said = f"prompt of {tokens:,} tokens" if kind == "pp" else f"{tokens:,} new tokens"
    return said + (f" behind {row['depth']:,}" if row["depth"] else "")


def positions(ends: Sequence[int]) -> list[str]:
    """Ranges of positions that end before these numbers: "0–127", "128–255"."""
    return [f"{first}–{end - 1}" for first, end in zip((0, *ends), ends, strict=False)]
