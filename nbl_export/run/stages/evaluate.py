"""The eval stage: every prepared task and text on the graphs of both decoders, on the CPU.

Graphs of a compiled engine are measured by float32 copies, as in verification.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import key_of, write_json
from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.records.inputs import Lazy
from nbl_export.records.requests import PERPLEXITY, Subject
from nbl_export.run.job import Job
from nbl_export.run.stages.common import Skipped, StageContext
from nbl_export.run_directory import DECODERS, EVAL_FILE, MADE_BY
from nbl_export.targets.base import Engine, compiler

__all__ = ["EvalInputs", "declare", "run"]


@dataclass(frozen=True)
class EvalInputs:
    """What figures of tasks and texts follow from, beside the graphs.

    variants: the decoders that are measured; the original of an NBL checkpoint lacks the removed attention.
    """

    asked: Lazy[tuple[Subject, ...]]
    variants: tuple[str, ...]
    engine: Lazy[Engine]
    head_dim: int
    cache_length: int


def declare(job: Job) -> EvalInputs | Skipped:
    """The inputs of the stage; left out unless it is asked for, because it can take hours on a small machine."""
    asked = job.evaluation
    if not asked:
        return Skipped()
    return EvalInputs(
        asked=Lazy([subject.asked for subject in asked], lambda: asked),
        variants=("nbl",) if job.options.fit == CHECKPOINT_FIT else tuple(DECODERS),
        engine=Lazy(None, lambda: job.engine),
        head_dim=job.decoder.head_dim,
        cache_length=job.cache_length,
    )


def run(inputs: EvalInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write eval.json; each finished figure is saved in the run immediately."""

    def keep(value: dict[str, Any]) -> None:
        with ctx.run.scratch() as scratch:
            write_json(scratch / EVAL_FILE, value)
            ctx.run.finish("eval", key_of("unfinished"), scratch, 0.0, ctx.readers, status=ctx.verdict)

    write_json(out / EVAL_FILE, _evaluate(inputs, ctx, keep))
    return {"status": ctx.verdict}


def _evaluate(inputs: EvalInputs, ctx: StageContext, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The content of eval.json; `keep` receives it after each new figure."""
    from nbl_export.evaluation import results

    subjects = inputs.asked.value
    known = results.read_entries(ctx.run.path / EVAL_FILE)
    models = {variant: key_of(ctx.run.stages[MADE_BY[DECODERS[variant]]]["files"]) for variant in inputs.variants}
    kept = {k: e for k, e in known.items() if e.get("model") == models.get(e.get("variant", ""))}
    for variant, model in models.items():
        keys = {key_of(model, subject.asked): subject for subject in subjects}
        missing = {key: subject for key, subject in keys.items() if key not in kept}
        if not missing:
            continue
        with _opened(inputs, ctx, variant) as scorer:
            for key, subject in missing.items():
                started = time.monotonic()
                with ctx.ui.task(f"{variant}: {subject.name}") as progress:
                    outcome = _measure(subject, scorer, progress, behind_prompt=ctx.plan.predicts)
                seconds = round(time.monotonic() - started, 3)
                kept[key] = results.entry(key, subject, variant, outcome, model=model, seconds=seconds)
                figures = ", ".join(f"{name} {metric.value:.4g}" for name, metric in outcome.metrics.items())
                ctx.ui.say(f"  {variant}: {subject.name}: {figures} ({outcome.items} items, {seconds:.1f} s)")
                keep(results.summarize(kept))
    return results.summarize(kept)


@contextlib.contextmanager
def _opened(inputs: EvalInputs, ctx: StageContext, variant: str) -> Iterator[Any]:
    """A decoder that scores texts."""
    from nbl_export.evaluation.scorer import GraphScorer, continuing_of, graph_scorer
    from nbl_export.methods.checkpoint.load import load_tokenizer

    directory = ctx.run.path / DECODERS[variant]
    engine = inputs.engine.value
    ctx.run.check(MADE_BY[DECODERS[variant]])
    if not engine.capabilities.static:
        yield graph_scorer(directory)
        return
    with ctx.run.scratch() as scratch:
        compiler(engine).write_float32(directory, scratch)
        decoder = engine.open_graph(scratch, inputs.head_dim)
        yield GraphScorer(decoder, load_tokenizer(directory), inputs.cache_length, continuing_of(directory))


def _measure(subject: Subject, scorer: Any, progress: Callable[[int, int], None], *, behind_prompt: bool) -> Any:
    """The outcome of a subject. Behind a prompt: the first half of each window is one, in both decoders."""
    from nbl_export.evaluation import length, measure, tasks

    test = subject.config.get("output_type")
    context = subject.config.get("context", 0)
    if test in length.TESTS:
        return length.run_length(
            test, subject.value, scorer, context, subject.limit, progress, behind_prompt=behind_prompt
        )
    if test == PERPLEXITY:
        windows = measure.windows(subject.value, scorer.tokenizer, context, subject.limit)
        return measure.run_windows(windows, scorer, progress, context // 2 if behind_prompt else 1)
    from nbl_export.evaluation.lm import DecoderLM

    lm = DecoderLM(scorer)
    lm.progress = progress
    return tasks.run_task(subject.value, lm, subject.limit)
