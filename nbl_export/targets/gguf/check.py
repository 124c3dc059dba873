"""Checks a written `deci` file against the model that it was made from.

Runs a GGUF file in llama.cpp and compares it with the torch model: greedy tokens, and perplexity.

llama.cpp multiplies quantised matrices by activations of 8 bits, so its logits differ from torch's, and a near-tie can
fall either way. The original's file shows how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nbl_export.graph.gguf.content import Content, Tensor, read_content
from nbl_export.mixers.base import Mixer
from nbl_export.records.results import CheckResult
from nbl_export.targets.gguf.engine import facts_of
from nbl_export.targets.gguf.linearize import ARCHITECTURE, KEEP, with_neighbours

__all__ = ["PROMPTS", "Answers", "Speaker", "check_file", "hear", "judge"]

# Largest error of an element, in units of the largest element of its block: half a step of the type's codes. Scales
# and offsets have 11 bits.
_STEP = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.5 / 127, "Q5_0": 1 / 16, "Q5_1": 1 / 31,
         "Q4_0": 1 / 8, "Q4_1": 1 / 15}  # fmt: skip
_SCALES = 2.0**-9
_BLOCK = 32


def check_file(path: Path, base: Content, maps: Mapping[int, Mixer], kind: str) -> list[CheckResult]:
    """Read a file back and compare: layers, caches, kept tensors and maps.

    Args:
        base: the original's content, as it was given to `linearized`.
    """
    found = read_content(path)
    stored, wanted = found.by_name, {t.name for t in base.tensors}
    gone = {f"blk.{i}.attn_{part}.{of}" for i in maps for part in "qkv" for of in ("weight", "bias")}
    kept = [t for t in base.tensors if t.name not in gone and t.name not in {_place(i) for i in maps}]
    results = [
        _verdict("architecture", found.architecture == ARCHITECTURE, found.architecture),
        _verdict("tensors", set(stored) == wanted - gone, f"{len(stored)} tensors"),
        _verdict("layers with a cache", facts_of(found).cache_layers == base.num_layers - len(maps),
                 f"{facts_of(found).cache_layers} of {base.num_layers}"),
        _verdict("maps in the file", not (worst := next(filter(None, (_map_problem(found, i, m.product()) for i, m in
                 sorted(maps.items()))), "")), worst or f"{len(maps)} as fitted"),
    ]  # fmt: skip
    if kind == KEEP:
        kept = [with_neighbours(t, base) for t in kept]
        other = next((t.name for t in kept if not _same(t, stored.get(t.name))), "")
        results.append(_verdict("kept tensors byte for byte", not other, other or f"{len(kept)} tensors"))
    return results


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and np.array_equal(one.read(), other.read())


def _place(layer: int) -> str:
    return f"blk.{layer}.attn_output.weight"


def _map_problem(found: Content, layer: int, matrix: Any) -> str:
    """How a layer's map in the file differs from the fitted map; "" if it does not differ."""
    tensor = found.by_name.get(_place(layer))
    if tensor is None or tensor.shape != matrix.shape:
        return f"layer {layer} has no map"
    blocks = matrix.reshape(-1, _BLOCK) if matrix.size % _BLOCK == 0 else matrix.reshape(1, -1)
    step = _STEP[tensor.kind.name]
    allowed = np.abs(blocks).max(1, keepdims=True) * (step + _SCALES * (step > 0)) + 1e-12
    if (np.abs(tensor.values().reshape(blocks.shape) - blocks) > allowed).any():
        return f"layer {layer}'s map is not the fitted one"
    return ""


def _verdict(metric: str, passed: bool, detail: str) -> CheckResult:
    return CheckResult("structure", "nbl", metric, None, None, passed, detail)


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Once upon a time, a small fox",
    "The three primary colours are",
    "import numpy as np\n",
    "In the year 1969, the first",
    "To make a cup of tea, you need",
)
_NEW_TOKENS = 24
_WINDOWS, _WINDOW = 4, 256  # of the perplexity
_TIMES_THE_ORIGINAL = 2.0  # the NBL file's difference of the mean log-probability from torch's, of the original file's
_ERRORS = 3.0  # standard errors of this difference over the positions


@dataclass(frozen=True)
class Answers:
    """What a decoder says: greedy ids of each prompt; log-probabilities and likeliest ids of the windows' tokens."""

    greedy: tuple[tuple[int, ...], ...]
    logs: np.ndarray
    best: np.ndarray

    @property
    def perplexity(self) -> float:
        """Of all windows together."""
        return math.exp(-float(self.logs.mean()))


class Speaker(Protocol):
    """A decoder."""

    def greedy(self, ids: Sequence[int], new_tokens: int) -> Sequence[int]: ...

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]: ...


def hear(speaker: Speaker, prompts: Sequence[Sequence[int]], windows_WT: Any) -> Answers:
    """Ask a decoder for the greedy continuation of prompts, and for the probabilities of text."""
    said = tuple(tuple(int(i) for i in speaker.greedy(ids, _NEW_TOKENS)) for ids in prompts)
    rows = [speaker.score([int(i) for i in row[:_WINDOW]]) for row in windows_WT[:_WINDOWS]]
    logs, best = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return Answers(said, logs, best)


def judge(torch_original: Answers, original: Answers, torch_nbl: Answers, nbl: Answers) -> list[CheckResult]:
    """Compare what llama.cpp says with what torch says, for the original's file and for the NBL file.

    Tokens are reported. The perplexity is gated: its logarithm may differ from torch's by `_TIMES_THE_ORIGINAL` times
    the original file's difference, and `_ERRORS` standard errors of the difference at single positions.
    """
    own = abs(float((original.logs - torch_original.logs).mean()))
    apart = nbl.logs - torch_nbl.logs
    limits = {"original": None, "nbl": _TIMES_THE_ORIGINAL * own + _ERRORS * float(apart.std()) / len(apart) ** 0.5}
    pairs = {"original": (original, torch_original), "nbl": (nbl, torch_nbl)}
    return [result for subject, pair in pairs.items() for result in _compare(subject, *pair, limits[subject])]


def _compare(subject: str, ours: Answers, theirs: Answers, limit: float | None) -> list[CheckResult]:
    same = sum(a == b for a, b in zip(ours.greedy, theirs.greedy, strict=True))
    agree = float((ours.best == theirs.best).mean())
    away = abs(float((ours.logs - theirs.logs).mean()))
    said = f"{away:.2g} ({ours.perplexity:.4g} in llama.cpp, {theirs.perplexity:.4g} in torch)"
    passed = math.isfinite(away) and (limit is None or away <= limit)
    count = f"{same} of {len(ours.greedy)}"
    return [
        CheckResult("quantised", subject, "prompts whose greedy tokens are torch's", float(same), None, True, count),
        CheckResult(
            "quantised", subject, "positions with torch's likeliest token", agree, None, True, f"{100 * agree:.1f}%"
        ),
        CheckResult(
            "quantised", subject, "difference of the logarithm of perplexity from torch's", away, limit, passed, said
        ),
    ]
