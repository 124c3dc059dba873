"""The gate of quality of all methods: what is within the limit, what a test found, and how both are said.

    losses of each text, window by window ─┐
    loss of long-range tokens ─────────────┤
    loss of answers of retrieval items ────┴─► step ─► within, or not ─► goal of the manifest, lines for the user

A step is one tested candidate. It is within the limit if the upper end of the 95% interval of the perplexity increase
is at most the limit on every text, and the upper end of the lost share of its long-range tokens, if it was measured, is
at most `LONG_RANGE_SHARE` times the limit. The same holds for each kind of retrieval items that is judged. A text with
too few long-range tokens (`records.quality.long_range_ends`) is judged by perplexity alone. All must pass, which needs
no correction (Berger 1982). Texts that test a limit neither ordered the candidates nor give final figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbl_export.errors import NblError
from nbl_export.methods.base import Limit, Maps, Task
from nbl_export.methods.losses import PartialReplacement
from nbl_export.records.quality import (
    LONG_RANGE_SHARE,
    describe_increase,
    describe_long_range,
    describe_retrieval,
    increase_ends,
    long_range_ends,
    loss_row,
    verdict,
)
from nbl_export.text.parts import Texts

__all__ = ["count_estimated", "count_trained", "lines", "point", "reached", "step", "steps_of_sets", "unreachable"]

Step = dict[str, Any]


def step(
    facts: Mapping[str, Any],
    losses: Mapping[str, Sequence[Any]],
    share: float,
    long_range: Sequence[Mapping[str, Any]] = (),
    retrieval: Sequence[Mapping[str, Any]] = (),
) -> Step:
    """A tested candidate, as the manifest has it.

    Args:
        facts: of the candidate. losses: of each text, one a window. share: the limit.
        long_range: of each text's long-range tokens (`records.quality.long_range_row`), if they were measured.
        retrieval: of each kind of items (`records.quality.retrieval_row`), if they were measured.
    """
    rows = [loss_row(name, found) for name, found in losses.items()]
    within = all(verdict(increase_ends(row), share) == "within" for row in rows)
    found = {"quality_losses": rows, "long_range": list(long_range), "retrieval": list(retrieval)}
    within &= all(_most_lost(row) <= LONG_RANGE_SHARE * share for row, _ in _deciding(found))
    return {**facts, "within": within, **found}


def _deciding(tested: Step) -> list[tuple[Mapping[str, Any], str]]:
    """Rows of long-range tokens and of answers that decide, each with what it says."""
    rows = [(row, describe_long_range(row)) for row in tested["long_range"]]
    return rows + [(row, describe_retrieval(row)) for row in tested["retrieval"] if row["judged"]]


def _most_lost(row: Mapping[str, Any]) -> float:
    """The upper end of what long-range tokens lose; minus infinity if they are too few to judge."""
    ends = long_range_ends(row)
    return -math.inf if ends is None else ends[1]


def failure(tested: Step, limit: Limit) -> str:
    """Why a step fails: the worst text beyond the limit, the worst undecided text, long-range tokens or answers."""
    verdicts = [(verdict(increase_ends(row), limit.share), row) for row in tested["quality_losses"]]
    beyond = [row for said, row in verdicts if said == "beyond"]
    undecided = [row for said, row in verdicts if said == "undecided"]
    if not beyond and not undecided:
        return max(_deciding(tested), key=lambda row: _most_lost(row[0]))[1]
    worst = max(beyond or undecided, key=lambda row: math.inf if row["increase"] is None else row["increase"])
    said = f"perplexity {describe_increase(worst)} on {worst['text']}"
    return said if beyond else f"{said}, which {worst['tokens']:,} tokens cannot tell from {limit.percent}"


def lines(limit: Limit, best: tuple[str, Step], failed: Sequence[tuple[str, Step]]) -> Iterator[str]:
    """What was found, for the user.

    Args:
        best: what is chosen, in words, and its step. failed: candidates that save more, in words, and their steps.
    """
    title, tested = best
    increases = (f"{describe_increase(row)} on {row['text']}" for row in tested["quality_losses"])
    yield f"{title}: perplexity {'; '.join(increases)}; {limit.text or limit.percent} is allowed"
    yield from map(describe_long_range, tested["long_range"])
    yield from map(describe_retrieval, tested["retrieval"])
    for name, other in failed:
        yield f"{name}: {failure(other, limit)}"


def unreachable(limit: Limit, what: str, instead: str) -> NblError:
    """The error if no candidate is within the limit.

    Args:
        what: the least of all losses that were seen. instead: what else a user can ask for.
    """
    flag = f"--max-perplexity-increase {limit.text}" if limit.text else f"the default limit of {limit.percent}"
    return NblError(f"{flag} cannot be met: {what}; allow more with --max-perplexity-increase, or {instead}")


def point(maps: Maps, speed: Any, kl: Sequence[float], increases: Sequence[float], **facts: Any) -> dict[str, Any]:
    """A point of the curve of quality against speed.

    Args:
        speed: modelled speed-ups. kl, increases: on each selection text. facts: further ones of the candidate.
    """
    return {
        "layers": len(maps),
        "replaced_layers": sorted(maps),
        **facts,
        "kl": list(kl),
        "increases": list(increases),
        "prefill": speed.prefill,
        "decode": speed.decode,
    }


# -- the first layers of an order --------------------------------------------------------------------------------


def steps_of_sets(
    partial: PartialReplacement, texts: Texts, orders: Sequence[Sequence[int]], share: float, task: Task
) -> list[Step]:
    """The step of each of several sets of layers; `task` shows progress."""
    sets = {len(order): order for order in orders}
    losses = {}
    for name, windows in texts:
        with task(f"replacing {' or '.join(map(str, sets))} layers, on {name}") as progress:
            losses[name] = partial.window_losses(windows, sets, progress)
    found = []
    for count, order in sets.items():
        of_count = {name: by_count[count] for name, by_count in losses.items()}
        found.append(step({"layers": count, "layer": order[-1]}, of_count, share))
    return found


def reached(path: list[Step], limit: Limit) -> tuple[int, dict[str, Any], list[str]]:
    """The most layers within the limit, the goal of the manifest, and lines for the user.

    Args:
        path: tested steps, ascending.

    Raises:
        NblError: one layer alone is not within the limit.
    """
    within = [tested for tested in path if tested["within"]]
    if not within:
        what = f"one layer alone ({path[0]['layer']}) gives {failure(path[0], limit)}"
        raise unreachable(limit, what, "ask for a number with --layers N")
    best = within[-1]
    count = best["layers"]
    failed = [(f"{count + 1} layers (with {s['layer']})", s) for s in path if s["layers"] == count + 1]
    title = f"{count} layer{'s' * (count > 1)} replaced"
    return count, {**limit.facts, "path": path}, list(lines(limit, (title, best), failed))


def count_estimated(partial: PartialReplacement, order: Sequence[int], share: float, texts: Texts, task: Task) -> int:
    """The most first layers of an order, at least 1, whose increase is at most `share` on every selection text."""
    sets = {count: order[:count] for count in range(1, len(order) + 1)}
    within = dict.fromkeys(sets, True)
    for name, windows in texts:
        with task(f"{len(sets)} sets of layers, on {name}") as progress:
            for count, loss in partial.quality_losses(windows, sets, progress).items():
                before, after = loss.perplexities
                within[count] &= after / before - 1 <= share  # False for NaN
    return max([count for count, kept in within.items() if kept], default=1)


def count_trained(
    partial: PartialReplacement, order: Sequence[int], limit: Limit, texts: Texts, task: Task
) -> tuple[int, dict[str, Any], list[str]]:
    """As `reached`, of the first layers of an order whose maps were trained: counts are tested downwards."""
    path: list[Step] = []
    while not (path and path[0]["within"]) and len(order) - len(path) > 0:
        path = steps_of_sets(partial, texts, [order[: len(order) - len(path)]], limit.share, task) + path
    return reached(path, limit)
