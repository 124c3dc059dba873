"""The verify stage: runs the verification ladder (`verify.verifier`) on probes, and measures the quality loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError
from nbl_export.files import write_json
from nbl_export.methods import cache_layers
from nbl_export.methods.rows import continuing_tokens
from nbl_export.model import memory
from nbl_export.options.goals import asked_increase
from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.records.quality import describe_long_range, describe_loss, warn_of_text
from nbl_export.records.sequential import LOOKS, describe_looks, looks_of
from nbl_export.run.job import Job, require_engine
from nbl_export.run.stages.common import StageContext
from nbl_export.run_directory import ACCEPTANCE_FILE, DECODERS, VERIFY_FILE
from nbl_export.targets.base import Engine, compiler
from nbl_export.targets.tokenizer import TOKENIZER, TokenizerFiles
from nbl_export.text import questions
from nbl_export.text.parts import Texts
from nbl_export.text.windows import LONG_ROW, PART_TOKENS, repeated, role_tokens
from nbl_export.verify import ladder
from nbl_export.verify.on_target import expect, save
from nbl_export.verify.perplexity import in_turn, quality_loss
from nbl_export.verify.structure import VerificationContext
from nbl_export.verify.verifier import Verifier

__all__ = ["VerifyInputs", "ask", "check", "declare", "loss_texts", "run", "uses_of"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_ANSWER_TOKENS = 48
_TWICE_ROWS = 4  # of a first look, with passages that occur twice, for long-range tokens
_LONG_TOKENS = 2048
_BEYOND_WINDOW = 512
_SESSION_SHARE = 1.6  # of a graph's files, that ONNX Runtime takes while it opens them (8B shape in int4: 1.53)
_LOGITS_SHARE = 1 / 8  # of the available memory, for logits of the original
_LONGEST_PROBED_WINDOW = 256  # that short rows and the batch exceed; the long row exceeds every window


@dataclass(frozen=True)
class VerifyInputs:
    """What verification follows from, beside the graphs.

    Attributes:
        engine: available here, or ONNX Runtime for a compiled engine.
        lacks_attention: the original of an NBL checkpoint lacks the removed attention.
        limit: most increase of perplexity, which decides how many windows are read.
        windows: for calibration. held_out: all that nobody calibrates on, in the order of the text.
        names: of the calibration text and of the second text.
        training: windows of a distillation; None without one. early_stopping: those that choose its best step.
        selection: the texts that layers were chosen by. validation: that decided how many. test: of the final figures.
        shortage: why the torch model does not fit into memory, so `mapped` is read; "" if it fits.
    """

    model: Lazy[Any]
    mapped: Lazy[Any]
    checkpoint: Lazy[Path]
    engine: Lazy[Engine]
    spec: DecoderSpec
    precision: str
    kept_logits: str
    cache_length: int
    lacks_attention: bool
    limit: float
    context: int
    names: Lazy[tuple[str, str]]
    windows: Lazy[Any]
    held_out: Lazy[Any]
    training: Lazy[Any] | None
    early_stopping: Lazy[Any]
    selection: Lazy[Texts]
    validation: Lazy[Texts]
    test: Lazy[Texts]
    shortage: Lazy[str]


def declare(job: Job) -> VerifyInputs:
    """The inputs of the stage. Compiled engines are proven by ONNX Runtime, whichever they are."""
    options = job.options
    text = job.text
    verified_by = "static form" if job.engine.capabilities.static else [options.engine, options.provider]
    return VerifyInputs(
        model=job.model,
        mapped=job.mapped,
        checkpoint=job.checkpoint,
        engine=Lazy(verified_by, lambda: require_engine(options, for_verification=True)),
        spec=job.decoder,
        precision=options.precision,
        kept_logits=options.kept_logits,
        cache_length=job.cache_length,
        lacks_attention=options.fit == CHECKPOINT_FIT,
        limit=asked_increase(options),
        context=options.context,
        names=Lazy(None, lambda: text.names),
        windows=text.windows,
        held_out=text.held_out,
        training=text.training if options.fit == "distilled" else None,
        early_stopping=text.early_stopping,
        selection=job.selection,
        validation=text.validation,
        test=text.test,
        shortage=job.shortage,
    )


def run(inputs: VerifyInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """Write verify.json, and acceptance-values.json for an engine of another machine."""
    result = check(inputs, ctx, out)
    write_json(out / VERIFY_FILE, result)
    return {"status": result["status"]}


def check(inputs: VerifyInputs, ctx: StageContext, out: Path) -> dict[str, Any]:
    """The content of verify.json."""
    verification = VerificationContext(
        engine=inputs.engine.value,
        spec=inputs.spec,
        plan=ctx.plan,
        precision=inputs.precision,
        logits=inputs.kept_logits,
        cache_length=inputs.cache_length,
        task=ctx.ui.task,
    )
    maps = ctx.maps()
    continuing = continuing_tokens(mixer.reads for mixer in maps.values())
    probe = make_probe(inputs, continuing)
    tokenizers = (ctx.run.path / DECODERS["original"], inputs.checkpoint.value)
    holder = next((directory for directory in tokenizers if (directory / TOKENIZER).is_file()), None)
    asked = ask(holder, continuing or 0, inputs.cache_length)
    if asked:
        probe = dataclasses.replace(probe, prompts=asked, new_tokens=_ANSWER_TOKENS)
    verifier = Verifier(verification, probe, maps)
    shipped = {subject: ctx.run.path / name for subject, name in DECODERS.items()}
    with _run_by_a_cpu(verification, shipped, ctx) as run:
        verifier.run(shipped, run)
        _check_exporter(verifier, inputs, run["original"])
        results = verifier.results
        ctx.ui.say(f"  graphs: {sum(r.passed for r in results)} of {len(results)} checks passed")
        quality_losses = list[dict[str, Any]]()
        long_range = list[dict[str, Any]]()
        if not inputs.lacks_attention:  # the loss takes as long again
            original, nbl, held = _open_both(verification, run)
            with ctx.ui.task("quality loss on held-back text") as progress:
                test = loss_texts(inputs, continuing)
                twice = _twice(test[0][1])
                looks: dict[str | None, tuple[int, ...]] = {None: looks_of(len(twice), _TWICE_ROWS)}
                looks |= {name: looks_of(len(windows), _first_look(inputs, windows)) for name, windows in test}
                quality_losses, long_range = quality_loss(
                    original,
                    nbl,
                    [*test, (None, twice)],
                    progress,
                    continuing,
                    held=held,
                    looks=looks,
                    limit=inputs.limit,
                )
            del original, nbl
        if verification.engine.capabilities.needs_target_gpu:
            save(expect(verification.precision, verifier.probe, verifier.references, continuing), out / ACCEPTANCE_FILE)
    said = {"answers": _answers(verifier, holder, asked=bool(asked)), "passage": questions.PASSAGE if asked else ""}
    return {**conclude(inputs, ctx, verifier, quality_losses, long_range), **said}


def _open_both(verification: VerificationContext, run: Mapping[str, Path]) -> tuple[Any, Any, int]:
    """The original and the NBL decoder, and the logits in bytes that may wait for the second one.

    They take turns if both do not fit into memory.
    """
    needed = _SESSION_SHARE * sum(file.stat().st_size for name in DECODERS for file in run[name].iterdir())
    available = memory.available_bytes()
    openers = [
        functools.partial(verification.engine.open_graph, run[name], verification.spec.head_dim) for name in DECODERS
    ]
    if needed <= available:
        return openers[0](), openers[1](), 0
    return *in_turn(*openers), int(_LOGITS_SHARE * available)


def _check_exporter(verifier: Verifier, inputs: VerifyInputs, original: Path) -> None:
    """Check exporter. The torch model is forgotten afterwards."""
    from nbl_export.verify import exporter

    verification = verifier.verification
    model = inputs.mapped if inputs.shortage.value else inputs.model
    with verification.task("torch model") as progress:
        if verification.precision in exporter.ROUNDED:
            decoder = verification.engine.open_graph(original, inputs.spec.head_dim)
            _, windows = loss_texts(inputs)[0]
            found = exporter.check_perplexity(model.value, decoder, verification.precision, windows, progress)
            verifier.results.append(found[0])
            verifier.warnings += filter(None, found[1:])
        else:
            reference = verifier.references["original"]
            verifier.results += exporter.check_logits(model.value, verification.precision, verifier.probe, reference)
    model.forget()


def ask(holder: Path | None, continuing: int, cache_length: int) -> tuple[tuple[int, ...], ...]:
    """Questions in the model's chat template; none without one, or if they are too short for an exit layer, or too
    long."""
    if holder is None:
        return ()
    text = TokenizerFiles(holder)
    fits = range(continuing + 1, cache_length - _ANSWER_TOKENS + 1)
    with contextlib.suppress(NblError):  # a template that cannot be applied
        found = [tuple(text.asked(turn) or ()) for turn in questions.turns()]
        return tuple(found) if all(len(ids) in fits for ids in found) else ()
    return ()


def _answers(verifier: Verifier, holder: Path | None, *, asked: bool) -> list[dict[str, str]]:
    """Prompts of the check `text`, and what both shipped decoders wrote behind them.

    Nothing without tokenizer.json, or if a decoder failed before it wrote.
    """
    if set(verifier.said) != set(DECODERS) or holder is None:
        return []
    text = TokenizerFiles(holder)
    prompts = verifier.probe.prompts
    shown = questions.QUESTIONS if asked else tuple(map(text.whole, prompts))
    return [
        {"prompt": shown[k]} | {name: text.behind(prompt, said[k]) for name, said in verifier.said.items()}
        for k, prompt in enumerate(prompts)
    ]


def conclude(
    inputs: VerifyInputs,
    ctx: StageContext,
    verifier: Verifier,
    quality_losses: list[dict[str, Any]],
    long_range: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The content of verify.json; prints the perplexity increases, what long-range tokens keep, and warnings."""
    plan = ctx.plan
    size = inputs.engine.value.capabilities.cache_itemsize(inputs.precision)
    layers = {"original": plan.num_layers, "nbl": len(cache_layers(plan))}
    per_token = {subject: inputs.spec.cache_bytes_per_token(kept, size) for subject, kept in layers.items()}
    warning = warn_of_text(quality_losses)
    for row in quality_losses:
        said = describe_loss(row)["increase"]
        look = describe_looks(row["windows"], row["looks"])
        ctx.ui.say(f"  perplexity {said}, {row['text']}, {row['tokens']:,} tokens, {look}")
    for row in long_range:
        ctx.ui.say(f"  {describe_long_range(row)}, {row['tokens']:,} tokens")
    for sentence in (*verifier.warnings, *filter(None, [warning])):
        ctx.ui.say(f"  {sentence}")
    found = ladder.summary(verifier.results, inputs.precision, quality_losses, plan)
    return {
        **found,
        "proof": ladder.proof(verifier.results, found["status"]),
        "warnings": verifier.warnings,
        "long_range_by_text": list(long_range),
        "quality_warning": warning,
        "texts": uses_of(inputs, ctx) if quality_losses else [],
        "cache_bytes_per_token": per_token,
    }


@contextlib.contextmanager
def _run_by_a_cpu(
    verification: VerificationContext, shipped: Mapping[str, Path], ctx: StageContext
) -> Iterator[dict[str, Path]]:
    """Directories of the graphs that a CPU runs: the deployed ones, or their float32 copies."""
    if not verification.static:
        yield dict(shipped)
        return
    with ctx.run.scratch() as scratch, ctx.ui.task("float32 copies"):
        for subject, directory in shipped.items():
            compiler(verification.engine).write_float32(directory, scratch / subject)
        yield {subject: scratch / subject for subject in shipped}


def make_probe(inputs: VerifyInputs, continuing: int | None = None) -> Any:
    """Rows and prompts from held-back text, and one long row, which may continue with calibration text.

    The first short row exceeds a small sliding window, the long row exceeds every sliding window. With an exit
    layer, rows and prompts are so long that tokens stop there, in the second row one alone. Calibration text then
    continues short text.

    Args:
        continuing: W, if prompts stop at an exit layer.
    """
    windows = inputs.windows.value
    cache_length = inputs.cache_length
    ids = inputs.held_out.value.flatten().tolist()
    window = inputs.spec.sliding_window or 0
    (first, second), prompt = _PREFILL_TOKENS, _PROMPT_TOKENS
    if 0 < window <= _LONGEST_PROBED_WINDOW:
        first = window + 24
    every = [*ids, *windows.flatten().tolist()]
    if continuing is not None:
        first = max(first, continuing + 25)
        second = continuing + 2
        prompt = continuing + prompt
        ids = ids if len(ids) >= 2 * first else every
    first, second = (min(n, cache_length - ladder.DECODE_STEPS, len(ids) // 2) for n in (first, second))
    rows = (ids[: first + ladder.DECODE_STEPS], ids[-(second + ladder.DECODE_STEPS) :])
    short = () if continuing is None else (rows[0], rows[1][: continuing + 1 + ladder.DECODE_STEPS])
    starts = [k * len(ids) // 4 for k in (0, 1, 2)]
    new_tokens = min(_NEW_TOKENS, cache_length - prompt)
    prompts = tuple(tuple(ids[s : s + prompt]) for s in starts)
    most = max(_LONG_TOKENS, window + _BEYOND_WINDOW if window else 0) + ladder.DECODE_STEPS
    long = every[: min(most, cache_length)]
    return ladder.Probe(
        tuple(map(tuple, rows)),
        prompts,
        new_tokens,
        tuple(long) if len(long) > len(rows[0]) else (),
        tuple(map(tuple, short)),
    )


def loss_texts(inputs: VerifyInputs, continuing: int | None = None) -> list[tuple[str, Any]]:
    """Final windows of both texts as arrays, in rows of the sequence length. No choice in the run used these windows.

    With an exit layer, rows are joined: the first half of each is a prompt that stops there (`verify.perplexity`).
    """
    context = min(inputs.context if continuing is None else max(inputs.context, LONG_ROW), inputs.cache_length)
    return [(name, _in_rows(windows.numpy(), context)) for name, windows in inputs.test.value]


def _first_look(inputs: VerifyInputs, rows_WT: Any) -> int:
    """Rows of the first look, which reads as many tokens of each text."""
    return max(2, role_tokens("test", inputs.context) // len(PART_TOKENS) // rows_WT.shape[1])


def _twice(rows_WT: Any) -> Any:
    """Few rows of the same length, whose second half repeats passages of the first."""
    most = _TWICE_ROWS << LOOKS - 1
    chosen = rows_WT[:: max(1, len(rows_WT) // most)][:most]
    return np.stack([repeated(ids_T, len(ids_T))[0].numpy() for ids_T in chosen])


def _in_rows(windows_WT: Any, context: int) -> Any:
    ids = windows_WT.reshape(-1)
    context = min(context, len(ids))  # a short text is one window
    return ids[: len(ids) // context * context].reshape(-1, context)


def uses_of(inputs: VerifyInputs, ctx: StageContext) -> list[dict[str, Any]]:
    """The value of "texts" in verify.json: for each use of a text, its name and number of tokens."""
    names = inputs.names.value
    used: list[tuple[str, str, Any]] = [("calibration: scores and maps", names[0], inputs.windows.value)]
    if inputs.training is not None:
        used.append(("distillation: training", names[0], inputs.training.value))
        used.append(("distillation: judging", names[0], inputs.early_stopping.value))
    if ctx.plan.select == "efficient":
        used += [("choice of layers", *text) for text in inputs.selection.value]
    if (ctx.run.manifest.get("goal") or {}).get("path"):
        used += [("number of layers", n, rows) for n, (_, rows) in zip(names, inputs.validation.value, strict=False)]
    used += [("final figures, at most", n, rows) for n, (_, rows) in zip(names, inputs.test.value, strict=False)]
    return [{"use": use, "text": name, "tokens": int(windows.numel())} for use, name, windows in used]
