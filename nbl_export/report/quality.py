"""Quality: its loss on held-out text, uses of text, benchmarks, and other numbers of layers."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nbl_export.options.options import CHECKPOINT_FIT
from nbl_export.records.paired import describe_ratio
from nbl_export.records.quality import FEWEST_PASSAGES, MOST_UNSURE, describe_kept, describe_loss, promise
from nbl_export.records.results import VERIFIED
from nbl_export.records.sequential import describe_looks
from nbl_export.report import words
from nbl_export.report.document import Block, Code, Details, Figure, Heading, Pair, Paragraph, Section
from nbl_export.report.length import length
from nbl_export.report.outcome import limit_of
from nbl_export.report.table import Column, Table

__all__ = ["answers", "benchmarks", "curve", "describe_curve", "losses", "quality", "uses"]

_VARIANTS = {"original": "Original", "nbl": "NBL"}
_MEANS = (
    "“Numerics verified” says that the graph computes what the original graph computes with these layers put in. "
    "It does not say that this quality loss is acceptable."
)


def answers(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """What both decoders wrote in the check `text`, side by side; nothing if it did not run."""
    found = report["answers"]
    passage = report["passage"]
    if not found:
        return ()
    same = sum(one["original"] == one["nbl"] for one in found)
    begun = (
        "Greedy answers of both decoders, 48 tokens at most, in the model's chat template. The questions are about a "
        "text of this tool."
        if passage
        else "Greedy text of both decoders behind pieces of held-back text, since the model has no chat template. "
        "So this report holds words of the calibration text: pass it on only if others may read them."
    )
    are = (
        f"{same} of {len(found)} texts {'is' if same == 1 else 'are'} the same. Greedy texts part at the first close "
        "call, and a small model is often wrong: see whether NBL is worse than the original."
    )
    own = Code(f'nbl-export generate {directory(report)} "..." --both')
    blocks: list[Block] = [Paragraph(f"{begun} {are} Ask your own questions:"), own]
    blocks += [Details("The text in question", (Paragraph(passage, "said"),))] if passage else []
    for one in found:
        blocks += [Heading(one["prompt"])] if passage else [Heading("Prompt"), Paragraph(one["prompt"].strip(), "said")]
        blocks.append(Pair(*((Heading(name), Paragraph(one[key].strip(), "said")) for key, name in _VARIANTS.items())))
    return (Section("What both write", tuple(blocks)),)


def directory(report: Mapping[str, Any]) -> str:
    """The run directory by its name, for commands."""
    try:
        given = shlex.split(report["command"])
    except ValueError:  # quotes that do not close
        given = []
    names = [after for option, after in itertools.pairwise(given) if option in ("--output", "-o")]
    return shlex.quote(names[-1]) if names else "DIR"


def quality(report: Mapping[str, Any]) -> Section:
    """What the replacement costs, or why that is not known."""
    loss = _losses(report) if report["quality_loss"] else (Paragraph(_missing(report)),)
    measured = report["quality"] or {}
    return Section("Quality loss", (*loss, *_benchmarks(measured), *length(measured.get("length", ()))))


def _missing(report: Mapping[str, Any]) -> str:
    said = "The quality loss was not measured"
    if not report["without_original"]:
        return f"{said}."
    return (
        f"{said}: the checkpoint came with its maps, but without the attention weights that the maps replace. "
        "These weights are zeros in the original here. So its speed is that of the original, but its text is not."
    )


def _losses(report: Mapping[str, Any]) -> Iterator[Block]:
    first = report["quality_loss"][0]
    prompt = first.get("prompt")
    stops = f"The first {prompt} of them are a prompt that stops at the exit layer, and the others are scored. "
    yield Paragraph(
        "Measured on held-out text: no map was fitted on this text and no layer was chosen by it. "
        f"Brackets hold a 95% interval over windows of {first['tokens'] // first['windows']} tokens. "
        f"{stops if prompt else ''}Both decoders read the same windows. "
        f"{_looks(report['quality_loss'])}A loss above the limit stops no run; the verdict on top says it. "
        f"{_MEANS if report['status'] == VERIFIED else ''}"
    )
    if report["quality_warning"]:
        yield Paragraph(f"Note: {report['quality_warning']}.")
    yield losses(report["quality_loss"])
    if report.get("long_range"):
        yield Paragraph(
            "The original predicts long-range tokens from the whole text, and not from the last 64 to 127 tokens. "
            f"A text is judged by them if at least {FEWEST_PASSAGES} of its passages have enough of them."
        )
        yield _long_range(report["long_range"])
    if report.get("retrieval"):
        yield Paragraph(
            "Retrieval items ask for facts of their own beginning, far behind the recent tokens. They were judged when "
            f"the exit layer was chosen, each kind by itself. A kind is judged if the original's perplexity of its "
            f"answers is at most {MOST_UNSURE:g}: an answer that the original does not find tells nothing."
        )
        yield _retrieval(report["retrieval"])
    said, share = limit_of(report)
    items = any(row["judged"] for row in report.get("retrieval", ()))
    yield Paragraph(f"What a limit of {said} allows: {promise(share, items=items)}")


def _looks(rows: Iterable[Mapping[str, Any]]) -> str:
    """At which look the reading of each text ended."""
    said = [(describe_looks(row["windows"], row.get("looks", ())), row["text"]) for row in rows]
    ended = "; ".join(f"{look}, on {text}" for look, text in said if look)
    return f"A text whose loss is undecided at the limit is read further: {ended}. " if ended else ""


def _long_range(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What is kept of long-range context on each text, and the perplexity of long-range tokens."""
    names = ("Tokens (passages)", "Perplexity original", "Perplexity NBL", "Kept of long-range context")
    return Table.of((Column("Text", "wrap"), *Column.numbers(*names)), map(_kept, rows), "")


def _retrieval(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What is kept of the answers of each kind of retrieval items, and their perplexity."""
    names = ("Tokens (rows)", "Perplexity original", "Perplexity NBL", "Kept of long-range context", "Judged")
    cells = ((*_kept(row), "yes" if row["judged"] else "no") for row in rows)
    return Table.of((Column("Kind", "wrap"), *Column.numbers(*names)), cells, "")


def _kept(row: Mapping[str, Any]) -> tuple[str, ...]:
    ends = (words.number(row.get(name), "not finite") for name in ("perplexity_original", "perplexity_nbl"))
    return row["text"], f"{row['tokens']:,} ({row['windows']})", *ends, describe_kept(row)


def losses(found: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """Perplexity, KL and top-1 agreement on each text."""
    names = ("Tokens (windows)", "Perplexity original", "Perplexity NBL", "Increase", "KL (nats)", "Top-1 agreement")
    return Table.of((Column("Text", "wrap"), *Column.numbers(*names)), map(_loss, found), title)


def _loss(loss: Mapping[str, Any]) -> tuple[str, ...]:
    said = describe_loss(loss)
    ends = (words.number(loss[name], "not finite") for name in ("perplexity_original", "perplexity_nbl"))
    tokens = f"{loss['tokens']:,} ({loss['windows']})"
    return loss["text"], tokens, *ends, said["increase"], said["kl"], said["top1"]


def uses(report: Mapping[str, Any]) -> Iterator[Block]:
    """Which text served what; for experts."""
    if not report["texts"]:
        return
    yield Heading("Text by use")
    yield Table.of(
        ("Use", Column("Text", "wrap"), Column("Tokens", "number")),
        [(text["use"], text["text"], f"{text['tokens']:,}") for text in report["texts"]],
    )
    distilled = ", including those of distillation," if report["fit"] == "distilled" else ""
    yield Paragraph(
        "No token of a text has two uses, with two exceptions. "
        "Training also reads the text that the maps are fitted on. "
        "One part of the text judges both the choice of layers and the training. "
        f"The tool's defaults{distilled} were tried with SmolLM2-135M and Qwen2.5-Coder-0.5B on C4, WikiText-2, "
        "news, the default text (offline) and other parts of Python's documentation. "
        "On such text they may look better than elsewhere."
    )


def _benchmarks(quality: Mapping[str, Any]) -> Iterator[Block]:
    if not quality.get("table"):
        return
    harness = f" by lm-evaluation-harness {quality['lm_eval']}" if quality["lm_eval"] else ""
    yield Heading("Benchmarks")
    yield Paragraph(
        f"Measured on the exported graphs{harness}. "
        "± is one standard error. The difference is NBL − original on the same items, with the error of the "
        "paired difference."
    )
    yield benchmarks(quality["table"])


def benchmarks(table: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """Figures of both decoders, and NBL minus original on the same items."""
    columns = ("Task", "Metric", *Column.numbers("Items", "Original", "NBL", "Difference"))
    return Table.of(columns, map(_scores, table), title)


def _scores(found: Mapping[str, Any]) -> tuple[str, ...]:
    metric = f"{found['metric'].replace('_', ' ')} {'↑' if found['higher_is_better'] else '↓'}"
    before, after = (found["figures"].get(variant) for variant in ("original", "nbl"))
    figures = words.with_stderr(before), words.with_stderr(after), words.signed(next(iter(found["differences"]), None))
    return words.task(found), metric, f"{found['items']:,}", *figures


# -- curve -----------------------------------------------------------------------------------------------------


_OTHER_SETS = "More or fewer layers"
_CURVE = Figure(
    "curve",
    "Perplexity over the original's, on the text with the largest increase, against the modelled speed-up of prefill. "
    "A point is a number of layers, or an exit layer. The ring marks this run.",
)


def curve(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, which says why if there is no curve."""
    found = report.get("curve")
    if not found:
        return (Section(_OTHER_SETS, (Paragraph(_no_curve(report)),)),)
    rises = tuple(f"Increase, {name}" for name in found["texts"])
    has_exit = bool(report.get("exit"))
    columns = (
        Column.numbers("Exit layer", "Recent tokens", *rises, "Long-range tokens", "Prefill")
        if has_exit
        else (*Column.numbers("Layers", *rises, "Prefill", "Decode"), Column("Which", "wrap"))
    )
    table = Table.of(columns, [_set(point) for point in found["points"]])
    note = Paragraph(" ".join(_curve_note(report, found)))
    title = "Other exit layers" if has_exit else _OTHER_SETS
    return (Section(title, (note, _CURVE, table)),)


def _no_curve(report: Mapping[str, Any]) -> str:
    if report["fit"] == CHECKPOINT_FIT:
        return "Layers and maps came with the checkpoint, so no other number of layers was measured."
    if report.get("exit"):
        return "The exit layer was named, so no other one was measured."
    return "Layers were named, or ordered by scores, so no other number of layers was measured."


def describe_curve(curve: Mapping[str, Any]) -> str:
    """The curve in a line: "4 layers: +15%, x1.12 prefill; 8: +29%, x1.24"."""
    said = []
    for k, point in enumerate(curve["points"]):
        unit = "" if k else f" layer{'s' * (point['layers'] > 1)}"
        prefill = f"×{describe_ratio(point['prefill'])}{'' if k else ' prefill'}"
        said.append(f"{point['layers']}{unit}: {_rise(max(point['increases']))}, {prefill}")
    return "; ".join(said)


def _rise(share: float) -> str:
    return f"{'+' if share >= 0 else '−'}{words.percent(abs(share))}"


def _set(point: Mapping[str, Any]) -> tuple[str, ...]:
    rises = (_rise(share) for share in point["increases"])
    prefill = f"×{describe_ratio(point['prefill'])}"
    if "recent_tokens" in point:
        long_range = point.get("long_range")
        lost = "–" if long_range is None else _rise(-long_range)
        return str(min(point["replaced_layers"])), str(point["recent_tokens"]), *rises, lost, prefill
    decode = f"×{describe_ratio(point['decode'])}"
    return str(point["layers"]), *rises, prefill, decode, words.listed(point["replaced_layers"])


def _curve_note(report: Mapping[str, Any], curve: Mapping[str, Any]) -> Iterator[str]:
    if report.get("exit"):
        yield from _of_exits(report, curve)
        return
    yield "The choice of layers measured each of these sets, before any training of the maps."
    yield "Increases of perplexity are of the text that chose the layers, so they are somewhat too low."
    of = f" for {curve['engine']} in {curve['precision']}" if "engine" in curve else ""
    yield f"Speed is modelled{of}: a prefill of {curve['tokens']} tokens, then one decode step."
    goal = report.get("goal") or {}
    if goal.get("default"):
        count = len(report["replaced_layers"])
        limit = goal["max_perplexity_increase"]
        yield f"Neither a count nor a goal was given, so the increase was limited to {limit} on every text."
        yield f"This run took the most layers that are shown to keep the limit: {count} {words.plural('layer', count)}."
    if report["fit"] == "independent":
        yield "Training the maps (--fit distilled) can lower the loss at no cost in speed. How much is unknown before."
    yield "nbl-export plan with --layers takes another count, best in a copy of the run, whose results it undoes."


def _of_exits(report: Mapping[str, Any], curve: Mapping[str, Any]) -> Iterator[str]:
    yield "Each point is an exit layer that was tried, with all layers above it; the choice began with the fastest one."
    yield "Increases of perplexity are of the text that chose the exit layer, at every position of its rows."
    yield "So is the change of what long-range tokens keep, on the text that loses most of it."
    of = f" for {curve['engine']} in {curve['precision']}" if "engine" in curve else ""
    yield f"Speed is modelled{of}: a prompt of {curve['tokens']} tokens. Decoding costs what it costs in the original."
    yield f"The chosen exit layer keeps the increase within {report['goal']['max_perplexity_increase']} on every text."
    yield "nbl-export plan with --exit-layer and --recent-tokens takes another one, best in a copy of the run, whose "
    yield "results it undoes."
