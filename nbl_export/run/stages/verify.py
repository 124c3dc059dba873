"""The verify stage: runs the verification ladder (`verify.verifier`) on probes, and measures the quality loss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.files import versions, write_json
from nbl_export.mixers import cache_layers
from nbl_export.mixers.base import Mixer
from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.plan.inputs import Texts
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy, identity_of
from nbl_export.records.quality import spoken_loss, warn_of_text
from nbl_export.records.results import CheckResult
from nbl_export.run.facts import require_engine
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import Place
from nbl_export.run_directory import ACCEPTANCE_FILE, DECODERS, PACKAGES, REFERENCES_FILE, VERIFY_FILE
from nbl_export.targets.base import Target
from nbl_export.targets.tokenizer import TOKENIZER, Text
from nbl_export.verify.codes import NEAREST, SEARCHED
from nbl_export.verify.kept import KeptReferences
from nbl_export.verify.ladder import WITHOUT_TWIN
from nbl_export.verify.on_target import expect, save
from nbl_export.verify.perplexity import quality_loss
from nbl_export.verify.structure import Setting, coded_graphs
from nbl_export.verify.verifier import Verifier

__all__ = ["VerifyInputs", "check", "declare", "kept_references", "loss_texts", "run", "uses_of"]

_PREFILL_TOKENS = (64, 37)
_PROMPT_TOKENS = 24
_NEW_TOKENS = 32
_LONG_TOKENS = 2048
_BEYOND_WINDOW = 512
_LONGEST_PROBED_WINDOW = 256  # that short rows and the batch exceed; the long row exceeds every window


@dataclass(frozen=True)
class VerifyInputs:
    """What verification follows from, beside the graphs.

    Attributes:
        engine: available here, or ONNX Runtime for a compiled engine.
        nearness: see `verify.structure.Setting`. codes: a checkpoint whose matrices the graphs have, or None.
        exporter: engine, provider and decoder source, for the kept references.
        lacks_attention: the original of an NBL checkpoint lacks the removed attention.
        windows: for calibration. held_back: all that nobody calibrates on, in the order of the text.
        names: of the calibration text and of the second text.
        training: windows of a distillation; None without one. judging: those that choose its best step.
        choosing: the texts that layers were chosen by. deciding: that decided how many. final: of the final figures.
        shortage: why the torch model does not fit into memory; "" if it fits.
    """

    model: Lazy[Any]
    checkpoint: Lazy[Path]
    engine: Lazy[Target]
    spec: DecoderSpec
    precision: str
    kept_logits: str
    cache_length: int
    nearness: float | None
    codes: Lazy[Any]
    exporter: tuple[str | None, ...]
    lacks_attention: bool
    context: int
    names: Lazy[tuple[str, str]]
    windows: Lazy[Any]
    held_back: Lazy[Any]
    training: Lazy[Any] | None
    judging: Lazy[Any]
    choosing: Lazy[Texts]
    deciding: Lazy[Texts]
    final: Lazy[Texts]
    shortage: Lazy[str]


def declare(r: Resolver) -> VerifyInputs:
    """The inputs of the stage. Compiled engines are proven by ONNX Runtime, whichever they are."""
    options, text = r.options, r.text
    proven_by = "static form" if r.engine.capabilities.static else [options.engine, options.provider]
    exporter = (None if r.engine.capabilities.static else options.engine, options.provider, options.decoder_source)
    return r.fill(
        VerifyInputs,
        engine=Lazy(proven_by, lambda: _engine(r)),
        nearness=_nearness(r),
        exporter=exporter,
        lacks_attention=options.fit == CHECKPOINT_FIT,
        names=Lazy(None, lambda: text.names),
        windows=text.windows,
        held_back=text.held_back,
        training=text.training if options.fit == "distilled" else None,
        judging=text.judging,
        choosing=text.choosing(r.spec.max_positions, alone=options.says_itself),
        deciding=text.deciding,
        final=text.final,
    )


def _engine(r: Resolver) -> Target:
    require_engine(r.options, to_prove=True)
    return r.engine


def _nearness(r: Resolver) -> float | None:
    if r.options.quantized_model is not None:
        return None
    searched = any(option.startswith("algo_config=k_quant") for option in r.options.builder_options)
    return SEARCHED if searched else NEAREST


def run(inputs: VerifyInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write verify.json, and acceptance.safetensors for an engine of another machine."""
    result = check(inputs, place, out)
    write_json(out / VERIFY_FILE, result)
    return {"status": result["status"]}


def check(inputs: VerifyInputs, place: Place, out: Path) -> dict[str, Any]:
    """The content of verify.json. The reference is the torch model."""
    setting, probe, maps, results = setting_of(inputs, place), make_probe(inputs), place.maps(), list[CheckResult]()
    with _graphs(inputs, place, setting, maps, results) as directories, place.run.scratch() as scratch:
        coded = coded_graphs(setting, directories, results, scratch)
        kept = kept_references(inputs, place)
        verifier = Verifier(setting, probe, maps, results, kept)
        floats = () if inputs.codes.value is None else inputs.codes.value.weights
        if inputs.shortage.value:
            verifier.refer_to_layers(coded, directories, inputs.checkpoint.value, floats)
        else:
            verifier.refer_to_torch(coded, lambda: _lent(inputs), floats)
        decoders = verifier.run(directories, coded)
        kept.save()
        passed = sum(result.passed for result in results)
        place.ui.say(f"  graphs: {passed} of {len(results)} checks passed")  # the loss takes as long again
        quality_losses = []
        if not inputs.lacks_attention:
            with place.ui.task("quality loss on held-back text") as progress:
                quality_losses = quality_loss(decoders["original"], decoders["nbl"], loss_texts(inputs), progress)
        _leave(verifier, out)
    answers = _answers(verifier, place.run.path / DECODERS["original"], inputs.checkpoint)
    return {**conclude(inputs, place, results, quality_losses), "answers": answers}


def _answers(verifier: Verifier, original: Path, checkpoint: Lazy[Path]) -> list[dict[str, str]]:
    """Prompts of the check `text`, and what both shipped decoders wrote behind them.

    Nothing without tokenizer.json, or if a decoder failed before it wrote.
    """
    holder = original if (original / TOKENIZER).is_file() or not verifier.said else checkpoint.value
    if set(verifier.said) != set(DECODERS) or not (holder / TOKENIZER).is_file():
        return []
    text = Text(holder)
    return [
        {"prompt": text.whole(prompt)} | {name: text.behind(prompt, said[k]) for name, said in verifier.said.items()}
        for k, prompt in enumerate(verifier.probe.prompts)
    ]


def _leave(verifier: Verifier, out: Path) -> None:
    """Write acceptance.safetensors for an engine of another machine; nothing for others."""
    setting = verifier.setting
    if setting.engine.capabilities.cross:
        exact = bool(verifier.truth_of_codes) or setting.precision not in WITHOUT_TWIN
        save(expect(setting.precision, verifier.probe, verifier.references, exact=exact), out / ACCEPTANCE_FILE)


@contextlib.contextmanager
def _lent(inputs: VerifyInputs) -> Iterator[Any]:
    """The torch model that graphs are made from; its memory is freed afterwards."""
    try:
        yield inputs.model.value
    finally:
        inputs.model.forget()


def kept_references(inputs: VerifyInputs, place: Place) -> KeptReferences:
    """The references of the original that an earlier verification of this run directory kept."""
    made = [inputs.model, inputs.codes, inputs.exporter, inputs.precision, inputs.cache_length]
    return KeptReferences(place.run.path / REFERENCES_FILE, [*map(identity_of, made), versions(PACKAGES)])


def setting_of(inputs: VerifyInputs, place: Place) -> Setting:
    """The verification settings of the run."""
    return Setting(
        engine=inputs.engine.value,
        spec=inputs.spec,
        plan=place.plan,
        precision=inputs.precision,
        logits=inputs.kept_logits,
        cache_length=inputs.cache_length,
        nearness=inputs.nearness,
        task=place.ui.task,
    )


def conclude(
    inputs: VerifyInputs, place: Place, results: list[CheckResult], quality_losses: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of verify.json; prints the perplexity increases and a warning if they differ strongly."""
    from nbl_export.verify import ladder

    plan, size = place.plan, inputs.engine.value.capabilities.cache_itemsize(inputs.precision)
    layers = {"original": plan.num_layers, "nbl": len(cache_layers(plan))}
    per_token = {subject: inputs.spec.cache_bytes_per_token(kept, size) for subject, kept in layers.items()}
    warning = warn_of_text(quality_losses)
    for row in quality_losses:
        said = spoken_loss(row)["increase"]
        place.ui.say(f"  perplexity {said}, {row['text']}, {row['tokens']:,} tokens")
    if warning:
        place.ui.say(f"  {warning}")
    found = ladder.summary(results, inputs.precision, quality_losses, plan)
    texts = uses_of(inputs, place) if quality_losses else []
    proof = ladder.proof(results, "the linearized torch model", found["status"])
    return {**found, "proof": proof, "quality_warning": warning, "texts": texts, "cache_bytes_per_token": per_token}


@contextlib.contextmanager
def _graphs(
    inputs: VerifyInputs, place: Place, setting: Setting, maps: Mapping[int, Mixer], results: list[CheckResult]
) -> Iterator[dict[str, Path]]:
    """Directories of the graphs to compare: the shipped graphs, or their float32 twins after an equality check."""
    shipped = {subject: place.run.path / name for subject, name in DECODERS.items()}
    if not setting.static:
        yield shipped
        return
    from nbl_export.verify.float32_twins import build_twins, check_shipped

    with place.run.scratch() as scratch, place.ui.task("fp32 twins"):
        twins = build_twins(inputs.checkpoint.value, setting, maps, scratch)
        results += check_shipped(setting, shipped, twins)
        yield twins


def make_probe(inputs: VerifyInputs) -> Any:
    """Rows and prompts from held-back text, and one long row, which may continue with calibration text.

    The first short row exceeds a small sliding window, the long row exceeds every sliding window.
    """
    from nbl_export.verify import ladder

    windows, cache_length = inputs.windows.value, inputs.cache_length
    ids = inputs.held_back.value.flatten().tolist()
    window = inputs.spec.sliding_window or 0
    first, second = _PREFILL_TOKENS
    if 0 < window <= _LONGEST_PROBED_WINDOW:
        first = window + 24
    first, second = (min(n, cache_length - ladder.DECODE_STEPS, len(ids) // 2) for n in (first, second))
    rows = (ids[: first + ladder.DECODE_STEPS], ids[-(second + ladder.DECODE_STEPS) :])
    starts = [k * len(ids) // 4 for k in (0, 1, 2)]
    new_tokens = min(_NEW_TOKENS, cache_length - _PROMPT_TOKENS)
    prompts = tuple(tuple(ids[s : s + _PROMPT_TOKENS]) for s in starts)
    long = [*ids, *windows.flatten().tolist()][: min(_long_tokens(window), cache_length)]
    return ladder.Probe(tuple(map(tuple, rows)), prompts, new_tokens, tuple(long) if len(long) > len(rows[0]) else ())


def _long_tokens(window: int) -> int:
    from nbl_export.verify import ladder

    return max(_LONG_TOKENS, window + _BEYOND_WINDOW if window else 0) + ladder.DECODE_STEPS


def loss_texts(inputs: VerifyInputs) -> list[tuple[str, Any]]:
    """Final windows of both texts as arrays, cut to the sequence length. No choice in the run used these windows."""
    context = min(inputs.context, inputs.cache_length)
    return [(name, _cut(windows.numpy(), context)) for name, windows in inputs.final.value]


def _cut(windows_WT: Any, context: int) -> Any:
    ids = windows_WT.reshape(-1)
    return ids[: len(ids) // context * context].reshape(-1, context)


def uses_of(inputs: VerifyInputs, place: Place) -> list[dict[str, Any]]:
    """The value of "texts" in verify.json: for each use of a text, its name and number of tokens."""
    names = inputs.names.value
    used: list[tuple[str, str, Any]] = [("calibration: scores and maps", names[0], inputs.windows.value)]
    if inputs.training is not None:
        used.append(("distillation: training", names[0], inputs.training.value))
        used.append(("distillation: judging", names[0], inputs.judging.value))
    if place.plan.select in ("greedy", "efficient"):
        used += [("choice of layers", *text) for text in inputs.choosing.value]
    if (place.run.manifest.get("goal") or {}).get("path"):
        used += [("number of layers", n, rows) for n, (_, rows) in zip(names, inputs.deciding.value, strict=False)]
    used += [("final figures", n, rows) for n, (_, rows) in zip(names, inputs.final.value, strict=False)]
    return [{"use": use, "text": name, "tokens": int(windows.numel())} for use, name, windows in used]
