"""The lossless stage: the original decoder with a proposer of tokens, checked and timed.

original/ ─► target ┐
int4 decoder ───────┼─► lossless/ ─► tokens equal, times ─► the fastest proposer ─► lossless.json
NBL int4 decoder ───┘

`bench DIR --lossless` times the chosen proposer again.

Are the greedy tokens the original's? Two chunk lengths take different kernels, so logits differ by rounding, and
near-ties fall either way. A difference passes if the original's two best logits are closer there than the precision's
`greedy_margin`.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import NblError, ParityError, RefusalError, UsageError
from nbl_export.files import write_json
from nbl_export.graph.gguf.blocks import is_known
from nbl_export.graph.names import GRAPH_FILE, MANIFEST
from nbl_export.measure.benchmark import where_measured
from nbl_export.measure.speculative import PLAIN, Asked, Sample, Way, best_of_each, overall, rows, time_ways
from nbl_export.model.checkpoint import pretrained
from nbl_export.options.goals import asked_layers
from nbl_export.options.options import GGUF, JobOptions
from nbl_export.options.settle import flag_of
from nbl_export.plan.inputs import OrderInputs
from nbl_export.records.capabilities import MOST_ROWS, Proposer, proposers_of
from nbl_export.records.decoder import DecoderSpec
from nbl_export.records.inputs import Lazy
from nbl_export.records.plan import Plan
from nbl_export.records.results import CheckResult
from nbl_export.report.words import decoding, equal_answers
from nbl_export.run.deployed import available_engine, locate
from nbl_export.run.progress import Ui
from nbl_export.run.resolve import Resolver
from nbl_export.run.stages.common import LeftOut, Place
from nbl_export.run.stages.plan import order_of
from nbl_export.run_directory import DECODERS, LOSSLESS_FILE, SUBJECTS, RunDirectory
from nbl_export.targets.base import ExportSettings, Target
from nbl_export.targets.runners import Draft
from nbl_export.text.prompts import MOST_EACH, prompts
from nbl_export.verify.ladder import TOLERANCES

__all__ = ["LOADS", "NEW_TOKENS", "SpeculativeInputs", "asked_of", "bench_speculative", "check_tokens",
           "codes_for_drafts", "declare", "first_differences", "margin", "measured", "run", "spoken"]  # fmt: skip

_MOST_BITS = 7  # a weight of a file whose codes make a cheap draft; int4 has 4.5 to 5
_CHECKED_TOKENS = 80

Blocks = Mapping[str, Mapping[str, Any]]  # name of a draft -> its block of genai_config.json
NEW_TOKENS = 64
LOADS = 5  # after the trial, which is load 0
_MOST_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class SpeculativeInputs:
    """What lossless decoding follows from, beside the graphs.

    Attributes:
        draft: what proposes tokens, "auto" for the fastest.
        draft_layers: how many or which layers the NBL draft replaces; None for those of the plan. order: for a count.
        codes: the GGUF file whose codes the drafts get instead of int4, or None.
    """

    engine: Lazy[Target]
    spec: DecoderSpec
    precision: str
    cache_length: int
    draft: str
    draft_layers: int | tuple[int, ...] | None
    first_threads: int | None
    codes: Lazy[Path | None]
    model: Lazy[Any]
    checkpoint: Lazy[Path]
    order: OrderInputs

    @property
    def proposers(self) -> tuple[Proposer, ...]:
        return proposers_of(self.draft, self.engine.value.capabilities.proposers)


def declare(r: Resolver) -> SpeculativeInputs | LeftOut:
    """The inputs of the stage; left out without `--draft`."""
    options = r.options
    if options.draft is None:
        return LeftOut()
    layers = None if options.draft_layers is None else asked_layers(options, r.spec, "draft_layers")
    takes_codes = not options.requantize and GGUF in r.engine.capabilities.precisions
    codes = Lazy([r.fingerprint, takes_codes], lambda: codes_for_drafts(r.source.gguf) if takes_codes else None)
    engine = Lazy([options.engine, options.provider], lambda: r.engine)
    return r.fill(SpeculativeInputs, engine=engine, draft_layers=layers, codes=codes, order=order_of(r))


def codes_for_drafts(file: Path | None) -> Path | None:
    """The GGUF file whose codes the draft gets instead of int4: they have the original's values, so more is accepted.

    None if there is no such file, if it cannot be taken over, or if its codes have as many bits as int8.
    """
    if file is None:
        return None
    matrices = [t for t in pretrained.reader(file).tensors if len(t.shape) == 2]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / sum(int(t.n_elements) for t in matrices)
    known = all(is_known(t.tensor_type.name) for t in matrices)
    return file if known and bits <= _MOST_BITS else None


def run(inputs: SpeculativeInputs, place: Place, out: Path) -> dict[str, Any]:
    """Write lossless/ and lossless.json."""
    own = inputs.precision == "int4" or (inputs.precision == GGUF and inputs.codes.value is not None)
    if inputs.draft == "int4" and own:
        place.ui.say("  an int4 draft of an int4 decoder proposes at the decoder's own cost; it cannot make it faster")
    original, target = place.run.path / DECODERS["original"], out / SUBJECTS["lossless"].directory
    engine = inputs.engine.value
    engine.write_target(original, target)
    blocks = _add_drafts(inputs, place, target)
    checks = _check_graph(inputs, original, target)
    trial, samples = _timed(inputs, place, target, blocks)
    found = _judged(inputs, original, [*trial, *samples], checks)
    result = {**measured(inputs.draft, inputs.precision, trial, samples), **found}
    chosen = next(p for p in inputs.proposers if p.name == result["chosen"]["name"])
    engine.settle(target, chosen, blocks)
    write_json(target / MANIFEST, {**_facts(place), "lossless": result["chosen"]})
    write_json(out / LOSSLESS_FILE, result)
    place.ui.say(f"  {spoken(result)}")
    return {}


def _facts(place: Place) -> dict[str, Any]:
    from nbl_export.options.options import public_facts

    kept, facts = ("schema", "model", "decoder", "options", "logits"), place.run.manifest
    return public_facts({k: facts[k] for k in kept if k in facts}, facts)


# -- drafts --------------------------------------------------------------------------------------------------


def _add_drafts(inputs: SpeculativeInputs, place: Place, target: Path) -> dict[str, dict[str, Any]]:
    """Add the drafts that are asked for to the folder."""
    wanted = {p.draft for p in inputs.proposers} - {"ngram"}
    if not wanted:
        return {}
    with place.run.scratch() as scratch, place.ui.task("drafts"):
        directories = {"int4": _int4(inputs, place, scratch / "int4")}
        if "nbl" in wanted:
            directories["nbl"] = _nbl(inputs, place, directories["int4"], scratch / "nbl")
        return {name: inputs.engine.value.add_draft(directories[name], target, name) for name in sorted(wanted)}


def _int4(inputs: SpeculativeInputs, place: Place, out: Path) -> Path:
    """The original decoder with int4 matrices, or with the codes of its file."""
    inputs.model.forget()
    codes, engine, checkpoint = inputs.codes.value, inputs.engine.value, inputs.checkpoint.value
    source = engine.capabilities.source
    coarse = ExportSettings(source, "int4")
    try:
        engine.export(checkpoint, out, coarse if codes is None else ExportSettings(source, GGUF, gguf=codes))
    except RefusalError as refused:
        if codes is None:
            raise
        place.ui.say(f"  drafts have int4 matrices, since the codes of {codes} do not fit: {refused.reason}")
        shutil.rmtree(out)
        engine.export(checkpoint, out, coarse)
    engine.keep_last_token(out)
    return out


def _nbl(inputs: SpeculativeInputs, place: Place, int4: Path, out: Path) -> Path:
    """The NBL decoder with the matrices of `int4`."""
    from nbl_export.plan.order import Selection

    plan = place.plan
    if inputs.draft_layers is None:
        layers, maps = plan.replaced, place.maps()
    else:
        selection = Selection(inputs.order, place.ui.task, place.run.manifest.get("greedy"))
        asked = inputs.draft_layers
        layers = tuple(sorted(selection.order(asked) if isinstance(asked, int) else asked))
        maps = selection.maps_of(layers)
    kinds = tuple(maps[i].kind for i in layers)
    chosen = Plan(plan.num_layers, layers, tap=plan.tap, kinds=kinds, others=plan.others)
    inputs.engine.value.linearize(int4, out, chosen, maps)
    return out


# -- checks and times ----------------------------------------------------------------------------------------


def _check_graph(inputs: SpeculativeInputs, original: Path, target: Path) -> list[CheckResult]:
    """Check last_token; nothing if the graph is the graph with all logits, byte for byte."""
    from nbl_export.verify.last_token import check_last_rows

    engine = inputs.engine.value
    if not engine.capabilities.last_rows:
        return []
    every = engine.open_graph(original, inputs.spec.head_dim)
    last = engine.open_graph(target, inputs.spec.head_dim, GRAPH_FILE)
    with engine.open_speculative(original, inputs.first_threads) as runner:
        ids = runner.encode(" ".join(p.text for p in prompts(2)), chat=False)[:_CHECKED_TOKENS]
    return [check_last_rows(every, last, ids, inputs.precision)]


def _timed(inputs: SpeculativeInputs, place: Place, target: Path, blocks: Blocks) -> tuple[list[Sample], list[Sample]]:
    """The trial of all proposers, and the rounds of the fastest of each draft."""
    engine = inputs.engine.value
    plain = functools.partial(engine.open_speculative, place.run.path / DECODERS["original"], inputs.first_threads)
    openers: dict[str, Callable[[], Any]] = {"original": plain}
    for name in ("ngram", *blocks):
        draft = Draft(name, blocks.get(name, {}))
        openers[name] = functools.partial(engine.open_speculative, target, inputs.first_threads, draft)
    ways = [Way(None, "original"), *(Way(p, p.draft) for p in inputs.proposers if p.draft in openers)]
    with plain() as runner:
        loads = asked_of(runner, inputs.cache_length - NEW_TOKENS, LOADS + 1)
    with place.ui.task("proposers") as progress:
        trial = time_ways(ways, openers, {0: loads[0]}, NEW_TOKENS, progress)
    with place.ui.task("lossless rounds") as progress:
        rest = {load: loads[load] for load in range(1, LOADS + 1)}
        return trial, time_ways(best_of_each(trial), openers, rest, NEW_TOKENS, progress)


def _judged(
    inputs: SpeculativeInputs, original: Path, samples: Sequence[Sample], checks: list[CheckResult]
) -> dict[str, Any]:
    """Where answers differ, and the verdict on graph and tokens.

    Raises:
        ParityError: the folder does not give the original's tokens.
    """
    with inputs.engine.value.open_runner(original, inputs.first_threads) as runner:
        differences = first_differences(samples, functools.partial(margin, runner))
    found = [*checks, check_tokens(samples, differences, inputs.precision)]
    for check in found:
        if not check.passed:
            raise ParityError(
                f"lossless decoding is not the original's: {check.metric}: {check.value} ({check.detail})"
            )
    return {"checks": [asdict(check) for check in found], "differences": differences}


# -- prompts and figures ---------------------------------------------------------------------------------------


def asked_of(runner: Any, most: int, loads_wanted: int) -> list[list[Asked]]:
    """The prompts of each load, one of each kind, as token ids of at most `most` tokens, and of 512."""
    loads: list[list[Asked]] = [[] for _ in range(loads_wanted)]
    counts: dict[str, int] = {}
    for prompt in prompts(loads_wanted):
        number = counts[prompt.kind] = counts.get(prompt.kind, -1) + 1
        ids = runner.encode(prompt.text, chat=prompt.chat)
        loads[number].append(Asked(prompt.kind, number, tuple(ids[: min(most, _MOST_PROMPT_TOKENS)])))
    return loads


def measured(draft: str, precision: str, trial: Sequence[Sample], samples: Sequence[Sample]) -> dict[str, Any]:
    """The figures of lossless.json: the trial, the rows, and the fastest proposer.

    `pays` says whether the fastest proposer is faster than plain decoding, by its whole interval.
    """
    best = sorted(overall(samples), key=lambda row: -row["ratio"])
    chosen = _named(samples, best[0]["proposer"])
    return {
        "asked": draft,
        "precision": precision,
        "chosen": chosen.to_json(),
        "pays": best[0]["verdict"] == "faster",
        "new_tokens": NEW_TOKENS,
        "verified_positions": MOST_ROWS,
        "trial": [{"proposer": row["proposer"], "ratio": row["ratio"]} for row in overall(trial)],
        "overall": best,
        "rows": rows(samples),
        **where_measured(),
    }


def _named(samples: Sequence[Sample], name: str) -> Proposer:
    return next(s.way.proposer for s in samples if s.way.proposer is not None and s.way.name == name)


def spoken(result: Mapping[str, Any]) -> str:
    """The outcome in a sentence."""
    best = result["overall"][0]
    interval = f"×{best['ratio']:.2f} ({best['low']:.2f} to {best['high']:.2f})"
    kind, equal = decoding(result["precision"]), f"{equal_answers(best)} equal"
    if result["pays"]:
        return f"{kind} with {best['proposer']}: {interval} of plain decoding, {equal}"
    return f"{kind} does not pay here: the fastest, {best['proposer']}, is {interval} of plain decoding, {equal}"


# -- equal tokens -----------------------------------------------------------------------------------------------


def first_differences(samples: Sequence[Sample], margin_of: Callable[[Sequence[int]], float]) -> list[dict[str, Any]]:
    """Where answers leave the plain ones, and how close the original's two best logits are there.

    Args:
        margin_of: token ids -> the difference of the original's two best logits behind them.
    """
    plain = {(s.load, s.asked): s.found.tokens for s in samples if s.way.name == PLAIN}
    found = []
    for sample in samples:
        ours, theirs = sample.found.tokens, plain[sample.load, sample.asked]
        if ours == theirs:
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((k for k, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
        margin = margin_of([*sample.asked.ids, *theirs[:at]])
        where = {"kind": sample.asked.kind, "prompt": sample.asked.number, "token": at, "of": len(theirs)}
        found.append({"proposer": sample.way.name, **where, "margin": margin})
    return found


def check_tokens(samples: Sequence[Sample], differences: Sequence[dict[str, Any]], precision: str) -> CheckResult:
    """Whether all greedy tokens are the original's, near-ties aside."""
    allowed = TOLERANCES[precision].greedy_margin
    answers = sum(s.way.name != PLAIN for s in samples)
    worst = max((d["margin"] for d in differences), default=0.0)
    detail = f"{answers - len(differences)} of {answers} answers are equal"
    if differences:
        detail += f"; the others differ first where two logits are at most {worst:.2g} apart"
    metric = "greedy tokens of the original: largest margin at a difference"
    return CheckResult("text", "lossless", metric, worst, allowed, worst <= allowed, detail)


def margin(runner: Any, ids: Sequence[int]) -> float:
    """The difference of a decoder's two best logits behind some tokens."""
    runner.begin(len(ids))
    runner.append(ids)
    second, first = np.partition(runner.last_logits(), -2)[-2:]
    return float(first - second)


# -- bench DIR --lossless ---------------------------------------------------------------------------------------


def bench_speculative(directory: Path, asked: Mapping[str, Any], ui: Ui) -> dict[str, Any]:
    """The figures of lossless.json for the chosen proposer, measured again; nothing is written.

    Args:
        asked: threads and repetitions, by the field names of JobOptions.

    Raises:
        UsageError: another option, or more than one number of threads. NblError: the run has no lossless/.
    """
    from nbl_export.measure.speculative import Way, time_ways

    options = JobOptions("", **asked)
    if options.batches != (1,):
        raise UsageError("--lossless is for one sequence: no runtime proposes tokens in a batch here")
    for name in sorted(set(asked) - {"threads", "repetitions"}):
        raise UsageError(f"{flag_of(name)} has no effect on --lossless, whose prompts are fixed; leave it out")
    if len(options.threads or ()) > 1:
        raise UsageError("--lossless measures one setting; give --threads one number")
    if (options.repetitions or 0) > MOST_EACH:
        raise UsageError(f"--repetitions is {MOST_EACH} at most with --lossless: every round has prompts of its own")
    folder, original = locate(directory, SUBJECTS["lossless"].directory), locate(directory, DECODERS["original"])
    engine = available_engine(folder)
    run = RunDirectory.peek(directory)
    name, precision = run.read_json(LOSSLESS_FILE)["chosen"]["name"], run.manifest["options"]["precision"]
    chosen = next((p for p in engine.capabilities.proposers if p.name == name), None)
    if chosen is None:
        raise NblError(f"{directory / LOSSLESS_FILE} names no known proposer; run its stage again")
    threads = options.first_threads
    openers = {p.path.name: functools.partial(engine.open_speculative, p.path, threads) for p in (original, folder)}
    ways = [Way(None, original.path.name), Way(chosen, folder.path.name)]
    with openers[original.path.name]() as runner:
        loads = asked_of(runner, runner.most_tokens - NEW_TOKENS, options.repetitions or LOADS)
    with ui.task("lossless rounds") as progress:
        samples = time_ways(ways, openers, dict(enumerate(loads)), NEW_TOKENS, progress)
    return measured(chosen.draft, precision, [], samples)
