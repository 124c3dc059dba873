"""Times lossless decoding against plain decoding, on the same prompts in the same rounds.

    load 0            every proposer ─► the fastest of each draft
    loads 1..n        these and plain decoding ─► ratios with intervals, and what was accepted

A round loads one folder after the other and answers a prompt of each kind, so a ratio compares runs of one round. The
prompts of a round are new. The trial of load 0 chooses, so its times are in no interval. The ratio is that of whole
answers, from the prompt to the last token: a draft reads the prompt too. Over all kinds it is that of the summed times.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from nbl_export.records.capabilities import Proposer
from nbl_export.records.paired import paired_ratio

__all__ = ["PLAIN", "Asked", "Sample", "Way", "best_of_each", "overall", "rows",
           "time_ways"]  # fmt: skip

PLAIN = "plain"
_WARM_UP_TOKENS = 8
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """A prompt: its kind, its number among the prompts of this kind, and its token ids."""

    kind: str
    number: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """A way of decoding: a proposer, or None for plain decoding, and the folder that it needs."""

    proposer: Proposer | None
    folder: str

    @property
    def name(self) -> str:
        """The proposer in words, or "plain"."""
        return PLAIN if self.proposer is None else self.proposer.name


@dataclass(frozen=True)
class Sample:
    """An answer: way, prompt, load, and the `targets.runners.Generation`."""

    way: Way
    asked: Asked
    load: int
    found: Any

    @property
    def token_ns(self) -> float:
        """Time for one token of the answer, behind the prompt."""
        return float(self.found.decode_ns / max(1, len(self.found.tokens)))

    @property
    def answer_ns(self) -> float:
        """Time for the prompt and the answer."""
        return float(self.found.prefill_ns + self.found.decode_ns)


def time_ways(
    ways: Sequence[Way],
    openers: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    loads: Mapping[int, Sequence[Asked]],
    new_tokens: int,
    progress: Progress,
) -> list[Sample]:
    """Answers of every way to every prompt.

    Args:
        openers: folder -> what opens its runner; one folder is in memory at a time.
        loads: number of a load -> the prompts of its round.
    """
    found: list[Sample] = []
    folders = list(dict.fromkeys(way.folder for way in ways))
    total = len(ways) * sum(map(len, loads.values()))
    for turn, (load, asked) in enumerate(loads.items()):
        start = turn % len(folders)
        for folder in folders[start:] + folders[:start]:
            own = [way for way in ways if way.folder == folder]
            with openers[folder]() as runner:
                runner.generation(asked[0].ids, _WARM_UP_TOKENS, _options(own[0]))
                for one in asked:
                    for way in own:
                        found.append(Sample(way, one, load, runner.generation(one.ids, new_tokens, _options(way))))
                        progress(len(found), total)
    return found


def _options(way: Way) -> dict[str, int | bool]:
    return {} if way.proposer is None else dict(way.proposer.options)


def best_of_each(samples: Sequence[Sample]) -> list[Way]:
    """The fastest way of each draft, and plain decoding."""
    spent: dict[Way, float] = {}
    for sample in samples:
        spent[sample.way] = spent.get(sample.way, 0.0) + sample.answer_ns
    best: dict[str, Way] = {}
    for way, ns in spent.items():
        draft = PLAIN if way.proposer is None else way.proposer.draft
        if draft not in best or ns < spent[best[draft]]:
            best[draft] = way
    return list(best.values())


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row for each proposer and kind of prompt: what was accepted, and the speed beside plain decoding."""
    return [
        _row(way, kind, _of(samples, plain, kind), _of(samples, way, kind))
        for plain in _ways(samples, plain=True)
        for way in _ways(samples, plain=False)
        for kind in dict.fromkeys(s.asked.kind for s in samples)
    ]


def overall(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """A row for each proposer over all kinds of prompts."""
    return [
        _row(way, "all", _of(samples, plain), _of(samples, way))
        for plain in _ways(samples, plain=True)
        for way in _ways(samples, plain=False)
    ]


def _ways(samples: Sequence[Sample], *, plain: bool) -> list[Way]:
    return [way for way in dict.fromkeys(s.way for s in samples) if (way.proposer is None) == plain]


def _of(samples: Sequence[Sample], way: Way, kind: str | None = None) -> list[Sample]:
    """The samples of a way in the order of load and prompt."""
    own = [s for s in samples if s.way == way and kind in (None, s.asked.kind)]
    return sorted(own, key=lambda s: (s.load, s.asked.kind, s.asked.number))


def _row(way: Way, kind: str, plain: Sequence[Sample], own: Sequence[Sample]) -> dict[str, Any]:
    loads = [s.load for s in own]
    ratio, decode, prefill = (
        paired_ratio([time(s) for s in plain], [time(s) for s in own], loads)
        for time in (lambda s: s.answer_ns, lambda s: s.token_ns, lambda s: s.found.prefill_ns)
    )
    proposed, accepted = (sum(getattr(s.found, name) for s in own) for name in ("proposed", "accepted"))
    steps = sum(s.found.rounds for s in own)
    return {
        "proposer": way.name,
        "kind": kind,
        "tokens_per_second": 1e9 / statistics.median(s.token_ns for s in own),
        "plain_tokens_per_second": 1e9 / statistics.median(s.token_ns for s in plain),
        **dataclasses.asdict(ratio),
        "verdict": ratio.verdict,
        "decode_ratio": decode.ratio,
        "prefill_ratio": prefill.ratio,
        "acceptance": accepted / proposed if proposed else None,
        "tokens_per_round": (accepted + steps) / steps if steps else None,
        "prompts": len(own),
        "equal": sum(a.found.tokens == b.found.tokens for a, b in zip(plain, own, strict=True)),
    }
