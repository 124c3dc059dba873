"""Runs one benchmark or one text on one model of the harness: an `Outcome` with a score for every item.

Every figure is a smooth function of means over items. To first order, item i changes the figure by u_i / n, with the
influence u_i (delta method; for ratios Cochran, Sampling Techniques, chapter 6):

    standard error            sd(u) / sqrt(n)
    of a paired difference    sd(u_a - u_b) / sqrt(n)

If both models find the same items hard, the paired error is much smaller than the two single errors combined.

A text is read in windows that do not overlap, as in the perplexity of `verify`:

    tokens    0 1 2 3 4 5 6 7 8 9 ...          context 5
    window 0  . p p p p                        . is read, p is read and scored
    window 1            . p p p p              (the first token of a window is never scored: it has no context)

Documents are tokenised one by one and joined, as for calibration. Tokens that do not fill the last window are dropped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbl_export.errors import NblError, UsageError
from nbl_export.evaluation.tasks import Benchmark
from nbl_export.text.corpus import READ_BYTES, Text

__all__ = ["AGGREGATIONS", "Figure", "Metric", "NamedText", "Outcome", "difference", "figure",
           "parse_named", "run_benchmark", "run_windows", "windows"]  # fmt: skip

_WINDOWS_AT_ONCE = 16
_SEED = 1234  # the harness' default for few-shot sampling; zero shots sample nothing


@dataclass(frozen=True)
class Metric:
    """A figure of a task. `items` [n] or [n, 2] are empty if the aggregation has no error formula."""

    value: float
    stderr: float | None
    aggregation: str
    higher_is_better: bool
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """The result of one model on one task.

    loglikelihoods: of each item, one number for each request. scored_tokens: the number of tokens in each of these
    sums. Both are empty if the task generates text.
    """

    items: int
    metrics: dict[str, Metric]
    loglikelihoods: tuple[tuple[float, ...], ...]
    scored_tokens: tuple[tuple[int, ...], ...]
    requests: int
    seconds: float

    @property
    def tokens(self) -> int:
        """Scored tokens of all requests."""
        return sum(map(sum, self.scored_tokens))


def run_benchmark(benchmark: Benchmark, lm: Any, limit: int | None) -> Outcome:
    """Run all requests of the first `limit` documents of each task on a model (None: all documents).

    A figure of a group is the mean over all documents of its tasks, as the harness weighs them.
    """
    progress, count, found = getattr(lm, "progress", None), len(benchmark.tasks), list[Outcome]()
    for k, task in enumerate(benchmark.tasks):
        if progress is not None:
            lm.progress = lambda done, total, k=k: progress(k * total + done, count * total)
        found.append(_run_task(task, lm, limit))
    return found[0] if count == 1 else _joined(found)


def _joined(parts: Sequence[Outcome]) -> Outcome:
    metrics = {}
    for name, first in parts[0].metrics.items():
        of_all = [part.metrics.get(name) for part in parts]
        if all(metric is not None and metric.aggregation == "mean" for metric in of_all):
            items = tuple(item for metric in of_all if metric for item in metric.items)
            pooled = figure("mean", items)
            metrics[name] = Metric(pooled.value, pooled.stderr, "mean", first.higher_is_better, items)
    return Outcome(
        sum(part.items for part in parts),
        metrics,
        tuple(row for part in parts for row in part.loglikelihoods),
        tuple(row for part in parts for row in part.scored_tokens),
        sum(part.requests for part in parts),
        sum(part.seconds for part in parts),
    )


def _run_task(task: Any, lm: Any, limit: int | None) -> Outcome:
    from lm_eval.evaluator import evaluate

    name = str(task.task_name)
    task.set_fewshot_seed(seed=_SEED)  # anew for each model: all get the same examples
    started = time.monotonic()
    found = evaluate(
        lm=lm,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        limit=limit,
        bootstrap_iters=0,  # `figure` computes errors
        log_samples=True,
    )
    seconds = time.monotonic() - started
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    first = samples[0]["filter"]
    samples = [sample for sample in samples if sample["filter"] == first]
    metrics = {
        metric: _metric(task, metric, value, [sample[metric] for sample in samples])
        for metric in samples[0]["metrics"]
        if isinstance(value := found["results"][name].get(f"{metric},{first}"), (int, float))
    }
    said = [_loglikelihoods(sample["filtered_resps"]) for sample in samples]
    tokens = [tuple(_scored(lm, arguments) for arguments in sample["arguments"]) for sample in samples]
    return Outcome(
        len(samples),
        metrics,
        tuple(said) if all(said) else (),
        tuple(tokens) if all(said) else (),
        sum(len(sample["arguments"]) for sample in samples),
        seconds,
    )


def _metric(task: Any, name: str, value: float, items: list[Any]) -> Metric:
    aggregation = getattr(task.aggregation()[name], "__name__", "")
    higher = bool(task.higher_is_better()[name])
    if aggregation not in AGGREGATIONS:
        return Metric(float(value), None, aggregation, higher, ())
    return Metric(float(value), figure(aggregation, items).stderr, aggregation, higher, tuple(items))


def _loglikelihoods(responses: Sequence[Any]) -> tuple[float, ...]:
    """Log-likelihoods of (log-likelihood, greedy?) pairs or of plain numbers; empty for generated text."""
    numbers = [response[0] if isinstance(response, (tuple, list)) else response for response in responses]
    return tuple(float(n) for n in numbers) if not any(isinstance(n, str) for n in numbers) else ()


def _scored(lm: Any, arguments: Sequence[Any]) -> int:
    """Tokens that a request scores."""
    if len(arguments) == 1:
        return len(lm.tok_encode(arguments[0]))
    context, continuation = arguments
    if not isinstance(continuation, str):
        return 0
    if not context:
        return len(lm.tok_encode(continuation, add_special_tokens=False))
    return len(lm._encode_pair(context, continuation)[1])


def run_windows(windows: Sequence[list[int]], lm: Any, progress: Callable[[int, int], None]) -> Outcome:
    """Perplexity over windows of token ids: exp of the mean loss of all tokens except the first of each window."""
    started = time.monotonic()
    scores: list[float] = []
    for begin in range(0, len(windows), _WINDOWS_AT_ONCE):
        asked = [(None, ids[:1], ids[1:]) for ids in windows[begin : begin + _WINDOWS_AT_ONCE]]
        scores += [loglikelihood for loglikelihood, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]
        progress(len(scores), len(windows))
    counts = [len(ids) - 1 for ids in windows]
    items = tuple(zip(scores, counts, strict=True))
    found = figure("weighted_perplexity", items)
    metric = Metric(found.value, found.stderr, "weighted_perplexity", False, items)
    said = tuple((score,) for score in scores)
    seconds = time.monotonic() - started
    tokens = tuple((n,) for n in counts)
    return Outcome(len(windows), {"token_perplexity": metric}, said, tokens, len(windows), seconds)


# -- standard errors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A value, or a difference of values, and its standard error; None for a single item."""

    value: float
    stderr: float | None


def _mean(items: np.ndarray) -> tuple[float, np.ndarray]:
    return float(items.mean()), items


def _perplexity(items: np.ndarray) -> tuple[float, np.ndarray]:
    """exp(-mean log-likelihood)."""
    value = math.exp(-float(items.mean()))
    return value, -value * items


def _loss_a_unit(items: np.ndarray) -> tuple[float, np.ndarray]:
    """-sum(log-likelihood) / sum(weight), for rows (log-likelihood, weight)."""
    value = -float(items[:, 0].sum() / items[:, 1].sum())
    return value, (-items[:, 0] - value * items[:, 1]) / items[:, 1].mean()


def _weighted_perplexity(items: np.ndarray) -> tuple[float, np.ndarray]:
    loss, influence = _loss_a_unit(items)
    return math.exp(loss), math.exp(loss) * influence


def _bits(items: np.ndarray) -> tuple[float, np.ndarray]:
    loss, influence = _loss_a_unit(items)
    return loss / math.log(2), influence / math.log(2)


# Aggregations by the harness' names. Items [n], or [n, 2] with a weight (words, bytes or tokens).
AGGREGATIONS: dict[str, Callable[[np.ndarray], tuple[float, np.ndarray]]] = {
    "mean": _mean,
    "perplexity": _perplexity,
    "weighted_perplexity": _weighted_perplexity,
    "bits_per_byte": _bits,
}


def figure(aggregation: str, items: Any) -> Figure:
    """The value of an aggregation over items, with its standard error."""
    value, influence = AGGREGATIONS[aggregation](np.asarray(items, np.float64))
    return Figure(value, _error(influence))


def difference(aggregation: str, new: Any, old: Any) -> Figure:
    """New minus old over the same items in the same order.

    Raises:
        ValueError: the numbers of items differ.
    """
    if len(new) != len(old):
        raise ValueError(f"{len(new)} items are not paired with {len(old)}")
    (a, u), (b, v) = (AGGREGATIONS[aggregation](np.asarray(items, np.float64)) for items in (new, old))
    return Figure(a - b, _error(u - v))


def _error(influence: np.ndarray) -> float | None:
    n = len(influence)
    return float(influence.std(ddof=1) / math.sqrt(n)) if n > 1 else None


# -- texts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedText:
    """A text for perplexity, and the user's name for the text."""

    name: str
    text: Text


def parse_named(option: str, words: str | None) -> tuple[tuple[str, str], ...]:
    """The pairs (name, file) of NAME=FILE,NAME=FILE, which an option got; none without words.

    Raises:
        UsageError: a word does not have this form, or two texts have the same name.
    """
    pairs = []
    for word in words.split(",") if words else ():
        name, sign, file = word.partition("=")
        if not (sign and name.strip() and file.strip()):
            raise UsageError(f"{option}: write NAME=FILE, comma separated, not {word!r}")
        pairs.append((name.strip(), file.strip()))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise UsageError(f"{option}: two texts have the same name; give each text its own name")
    return tuple(pairs)


def windows(named: NamedText, tokenizer: Any, context: int, limit: int | None) -> list[list[int]]:
    """Token ids of each window; at most `limit` windows.

    Raises:
        NblError: the text is shorter than one window, or the windows need more of the text than was read.
    """
    ids: list[int] = []
    enough = None if limit is None else context * limit
    for document in named.text.documents:
        ids.extend(tokenizer(document, verbose=False)["input_ids"])
        if enough is not None and len(ids) >= enough:
            break
    if named.text.cut and (enough is None or len(ids) < enough):
        raise NblError(f"of the text {named.name} only the first {READ_BYTES >> 20} MiB are read; give --limit")
    starts = range(0, len(ids) - context + 1, context)[:limit]
    if not starts:
        raise NblError(
            f"the text {named.name} has {len(ids)} tokens, fewer than one window of {context}; "
            "give more text or a smaller --ppl-context"
        )
    return [ids[start : start + context] for start in starts]
