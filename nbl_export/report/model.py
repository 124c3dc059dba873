"""What the report says of the model: verdict, headline figures, verification, how it was made, and what experts ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from nbl_export.records.plan import USUAL_KIND, describe_layers
from nbl_export.records.quality import describe_kept, describe_loss
from nbl_export.records.results import FAILED, VERIFIED, YES_NO, describe_background
from nbl_export.report import words
from nbl_export.report.document import (
    Alarm,
    Badge,
    Bar,
    Block,
    Card,
    Cards,
    Code,
    Details,
    Heading,
    Items,
    Paragraph,
    Section,
    Strip,
)
from nbl_export.report.length import in_short
from nbl_export.report.outcome import (
    Timed,
    at_limit,
    describe_exit,
    headline,
    judged,
    limit_of,
    verdict,
    worst_long_range,
    worst_loss,
)
from nbl_export.report.quality import uses
from nbl_export.report.speed import describe_threads, intervals
from nbl_export.report.table import Cell, Column, Table, Tone

__all__ = ["checks", "experts", "head", "origin", "scores", "title", "verification"]

_CHOSEN_BY = {"cca": "the smallest CCA bounds", "efficient": "the smallest quality loss for the work saved"}
_TONES: Mapping[str, Tone] = {"faster": "ok", "slower": "bad"}
_JUDGED: Mapping[str, Tone] = {"within": "ok", "above": "bad", "undecided": ""}
_SHOWN = 4  # tests of one card; the table has all


def title(report: Mapping[str, Any]) -> str:
    """What the model is called."""
    model = report["model"]
    return str(model.get("title") or model["name"])


def head(report: Mapping[str, Any]) -> tuple[Block, ...]:
    """Verdict, headline figures, what is compared, and whether the numbers of the graph are right."""
    said = verdict(report)
    replaced = report["replaced_layers"]
    failures = _failures(report)
    badge = (_badge(report),)
    return (
        _meta(report),
        *((*badge, *failures) if failures else ()),
        *([Paragraph(said, "lead")] if said else ()),
        *_busy(report),
        *_apart(report),
        Cards((_speed(report, "pp", "Time to first token"), _loss(report), *_changed(report))),
        *_unchanged(report),
        Paragraph(_compared(report)),
        Paragraph(_lead(report)),
        Strip(report["num_layers"], dict(zip(replaced, report["kinds"] or [USUAL_KIND] * len(replaced), strict=False))),
        *(() if failures else badge),
    )


def _meta(report: Mapping[str, Any]) -> Paragraph:
    model = report["model"]
    bench = report["bench"]
    parts = [f"{model['architecture']}", ", ".join(filter(None, (report["precision"], report["codes"])))]
    parts += [f"{bench['engine']} on {bench['provider']}, {describe_threads(bench)}"] if bench else []
    parts += [report["machine"]["cpu"]] if (report["machine"] or {}).get("cpu") else []
    parts += [f"revision {model['revision']}"] if model.get("revision") else []
    return Paragraph(" · ".join(parts), "meta")


def _badge(report: Mapping[str, Any]) -> Badge:
    worst = report["largest_logit_difference"]
    detail = "no check compared logits"
    if worst:
        allowed = "not gated" if worst["tolerance"] is None else f"tolerance {worst['tolerance']:g}"
        seen = words.number(worst["value"], "not finite")
        detail = f"largest logit difference {seen} ({worst['subject']}, {worst['metric']}), {allowed}"
    if report["status"] == VERIFIED:
        means = "the graph computes what it should, which says nothing about quality"
        return Badge("Numerics verified", f"{means}; {detail}", "ok")
    return Badge("Verification failed", detail, "bad")


def _failures(report: Mapping[str, Any]) -> tuple[Block, ...]:
    if report["status"] != FAILED:
        return ()
    said = "Do not deploy this model. Speed and quality loss below belong to a graph that did not pass its checks."
    reasons = tuple(_failure(check) for check in report["checks"] if not check["passed"])
    return (Alarm(said, reasons or ("The run is marked as failed, but no check is.",)),)


def _failure(check: Mapping[str, Any]) -> str:
    allowed = "none" if check["tolerance"] is None else f"{check['tolerance']:g}"
    seen = words.number(check["value"], "not finite")
    return f"Check {check['check']}, {check['subject']}, {check['metric']}: {seen}, tolerance {allowed}. " + (
        check.get("detail") or ""
    )


def _lead(report: Mapping[str, Any]) -> str:
    replaced = report["replaced_layers"]
    total = report["num_layers"]
    if not replaced:
        return f"None of the {total} attention layers is replaced: both variants are the original."
    if prompt_exit := describe_exit(report):
        return _of_exit(report, prompt_exit)
    one = len(replaced) == 1
    is_drop = report["fit"] == "drop"
    done = "left out" if is_drop else "replaced by a linear layer"
    chosen = _CHOSEN_BY.get(report["select"], "as requested")
    chosen = "from the checkpoint" if report["without_original"] else chosen
    said = (
        f"{len(replaced)} of {total} attention layers {'is' if one else 'are'} {done}: "
        f"{words.plural('layer', len(replaced))} {describe_layers(replaced)} ({chosen}). "
    )
    if report["without_original"]:
        return f"{said}A linear layer needs no KV cache. Layers and maps came with the checkpoint."
    if is_drop:
        return f"{said}Without attention a layer needs no KV cache. This is a baseline."
    return f"{said}A linear layer needs no KV cache."


def _of_exit(report: Mapping[str, Any], said: str) -> str:
    chosen = "chosen by quality" if (report["goal"] or {}).get("path") else "as requested"
    return (
        f"{said[0].upper()}{said[1:]} ({chosen}). A prompt of at most {report['exit']['recent_tokens'] + 1} tokens, "
        "and each generated token, is computed as in the original."
    )


def _busy(report: Mapping[str, Any]) -> tuple[Block, ...]:
    where = report["bench"] and report["bench"]["background"]
    if not where or not where["busy"]:
        return ()
    return (Alarm(f"Speed was {describe_background(where)}. Other processes affect the speed figures below."),)


def _apart(report: Mapping[str, Any]) -> tuple[Block, ...]:
    if not (report["bench"] or {}).get("apart"):
        return ()
    return (
        Paragraph(
            "Memory was too short for both decoders at once, so each round timed them one after the other. Changes of "
            "the machine's speed during a round affect the ratios."
        ),
    )


def _compared(report: Mapping[str, Any]) -> str:
    """Which two decoders the figures are of."""
    weights = ", ".join(filter(None, (report["precision"], report["codes"])))
    if not report["replaced_layers"]:
        return "Both decoders are the original."
    changed = "the same with predicted KV" if report.get("exit") else "the same with the replaced layers"
    source = "weights of the GGUF file, dequantised" if report["model"]["name"].endswith(".gguf") else "all layers"
    return f"Original: {source}, exported by the same tool in {weights}. NBL: {changed}."


def _speed(report: Mapping[str, Any], kind: str, name: str) -> Card:
    """Of the longest test: how much faster, the time before and after, and a line for each other test."""
    tests = headline(report, kind)
    if not tests:
        return Card(name, "not measured", tone="words")
    first = tests[0]
    lines = [test.line for test in tests[:_SHOWN]]
    if len(tests) > _SHOWN:
        lines.append(f"and {len(tests) - _SHOWN} more below")
    said = first.verdict.removesuffix(", noisy")
    figure = f"{first.ratio_text} {first.verdict}" if said == "faster" else first.ratio_text
    return Card(name, figure, tuple(lines), _TONES.get(first.verdict, "" if said in _TONES else "words"), _bars(first))


def _bars(test: Timed) -> tuple[Bar, ...]:
    """The time of a prompt before and after; nothing without a difference."""
    rows = {"original": test.original, "NBL": test.nbl}
    times = {name: row["ttft_seconds"] for name, row in rows.items() if row and row["ttft_seconds"]}
    if test.verdict not in _TONES or len(times) < len(rows):
        return ()
    longest = max(times.values())
    return tuple(
        Bar(name.lower(), f"{words.milliseconds(time)} {name}", time / longest) for name, time in times.items()
    )


def _changed(report: Mapping[str, Any]) -> Iterator[Card]:
    """Decode and cache, each if it differs from the original's or was not measured."""
    if not _is_same_decode(report):
        yield _speed(report, "tg", "Decode")
    cache = report["cache_bytes_per_token"]
    if cache["original"] != cache["nbl"]:
        ends = f"{words.size(cache['original'])} → {words.size(cache['nbl'])} for each token"
        yield Card("KV cache", words.change(cache["original"], cache["nbl"]), (ends,))


def _unchanged(report: Mapping[str, Any]) -> Iterator[Block]:
    """Decode and cache in one line, each if no difference is shown."""
    cache = report["cache_bytes_per_token"]
    said = []
    if _is_same_decode(report):
        said += [f"Decode of {test.line}." for test in headline(report, "tg")[:_SHOWN]]
    if cache["original"] == cache["nbl"]:
        said.append(f"KV cache: as in the original, {words.size(cache['nbl'])} for each token.")
    if said:
        yield Paragraph(" ".join(said))


def _is_same_decode(report: Mapping[str, Any]) -> bool:
    tests = headline(report, "tg")
    return bool(tests) and all(test.verdict == "no clear difference" for test in tests)


def _loss(report: Mapping[str, Any]) -> Card:
    """Of the text that suffers most; the table has the others. Its colour is that of the user's goal."""
    rows = report["quality_loss"]
    if not rows:
        return Card("Quality loss", "not measured", tone="words")
    worst = worst_loss(rows)
    said = describe_loss(worst)["increase"]
    ends = " → ".join(words.number(worst[name], "not finite") for name in ("perplexity_original", "perplexity_nbl"))
    lines = [f"{at_limit(judged(report))} the limit of {limit_of(report)[0]}", f"{said} on {worst['text']}: {ends}"]
    if long_range := worst_long_range(report["long_range"]):
        lines.append(f"long-range tokens keep {describe_kept(long_range)} at worst")
    if items := worst_long_range([row for row in report["retrieval"] if row["judged"]]):
        lines.append(f"answers of retrieval items keep {describe_kept(items)} at worst")
    lines += in_short((report["quality"] or {}).get("length", ()))
    return Card("Quality loss: perplexity, worst text", said.partition(" (")[0], tuple(lines), _JUDGED[judged(report)])


# -- verification ---------------------------------------------------------------------------------------------

_CHECK = (
    "Check",
    "Subject",
    Column("Metric", "wrap"),
    *Column.numbers("Value", "Tolerance"),
    "Verdict",
    Column("Detail", "detail"),
)


def verification(report: Mapping[str, Any]) -> Section:
    """What is proven, and warnings."""
    proof = (Items(tuple(report["proof"])),) if report["proof"] else ()
    warnings = (Paragraph(f"Note: {said}.") for said in report["warnings"])
    passed = sum(check["passed"] for check in report["checks"])
    every = Paragraph(f"{passed} of {len(report['checks'])} checks passed; all of them stand under “For experts”.")
    return Section("Verification", (*proof, *warnings, every))


def checks(found: Iterable[Mapping[str, Any]], title: str = "") -> Table:
    """What each check has seen, and what was allowed."""
    return Table.of(_CHECK, map(_check, found), title)


def _checks(found: Iterable[Mapping[str, Any]], precision: str) -> tuple[Block, ...]:
    table = checks(found)
    note = (
        f"Each check compares one figure with a tolerance that was fixed beforehand for {precision}. "
        "A mark stands for a check that has no figure."
    )
    return Heading(f"All {len(table.rows)} checks"), Paragraph(note), table


def _check(check: Mapping[str, Any]) -> tuple[Cell | str, ...]:
    tolerance = check["tolerance"]
    verdict = "failed" if not check["passed"] else "not gated" if tolerance is None else "passed"
    allowed = "–" if tolerance is None else f"{tolerance:g}"
    said = Cell.verdict(verdict, good="passed", bad="failed")
    seen = words.number(check["value"], "not finite")
    if tolerance == YES_NO and check["value"] in (0.0, 1.0) and check["check"] != "text":
        seen = "✓" if check["passed"] else "✗"
        allowed = ""
    return check["check"], check["subject"], check["metric"], seen, allowed, said, check.get("detail") or ""


# -- origin ----------------------------------------------------------------------------------------------------


def origin(report: Mapping[str, Any]) -> Section:
    """The command, the text and the machine."""
    text = report["calibration"]
    fitted = "" if report["without_original"] else f"Calibrated on {text['tokens']:,} tokens of {text['name']}. "
    took = sum(report["stage_seconds"].values())
    made = f"{fitted}The stages took {words.duration(took)}." if took else fitted
    return Section("How it was made", (Code(report["command"]), Paragraph(made), *_machine(report)))


_SCORES = (
    "How well a linear layer can replace each layer's attention, on the calibration text; smaller is better. "
    "The CCA bound ranks layers and says nothing about the size of an error. "
    "The bound is often far above 1, while the NMSE of a fitted map is at most 1. "
    "The relative error is that of the residual output, the NMSE that of the attention output alone."
)
_TRAINING = ("distill_tokens", "lora_rank", "label_weight")


def experts(report: Mapping[str, Any]) -> Section:
    """One fold: intervals, checks, scores, uses of text, and what another needs to make the same model."""
    took = [(name, words.duration(seconds)) for name, seconds in report["stage_seconds"].items()]
    blocks = (
        *intervals(report),
        *uses(report),
        *_checks(report["checks"], report["precision"]),
        *((Heading("Scores of all layers"), Paragraph(_SCORES), scores(report)) if report["scores"] else ()),
        *_text(report),
        *_settings(report),
        *_versions(report),
        Heading("Stages"),
        Table.of(("Stage", Column("Time", "number")), took),
    )
    return Section("For experts", (Details("Checks, scores, texts, settings, versions", blocks),))


def scores(found: Mapping[str, Any], title: str = "") -> Table:
    """Scores of layers, smallest bound first, of the value of report.json or nbl.json."""
    columns = ("Layer", "Attention", *Column.numbers("CCA bound", "NMSE", "Relative error"))
    return Table.of(
        columns,
        [
            (
                str(score["layer"]),
                "replaced" if score["layer"] in found["replaced_layers"] else "kept",
                *(words.number(score[name]) for name in ("bound", "nmse", "relative_error")),
            )
            for score in sorted(found["scores"], key=lambda score: (score["bound"], score["layer"]))
        ],
        title,
    )


def _settings(report: Mapping[str, Any]) -> tuple[Block, ...]:
    """The options that are set; those of training only if maps were trained."""
    unused = () if report["fit"] == "distilled" else _TRAINING
    given = ((name, value) for name, value in (report["options"] or {}).items() if value not in (None, [], ()))
    return _facts("Settings", ((name.replace("_", " "), value) for name, value in given if name not in unused))


def _versions(report: Mapping[str, Any]) -> Iterator[Block]:
    versions = report["versions"] or {}
    yield from _facts("Versions", versions.items())
    other = [pair for pair in ((report["bench"] or {}).get("versions") or {}).items() if pair not in versions.items()]
    yield from _facts("Versions at the benchmark", other) if other else ()


def _text(report: Mapping[str, Any]) -> tuple[Block, ...]:
    text = report["calibration"]
    parts = ((f"sha256 of {part['name']}", part["sha256"]) for part in text.get("parts", ()))
    facts = (
        ("name", text["name"]),
        ("sha256", text["sha256"]),
        *parts,
        ("tokens", f"{text['tokens']:,}"),
        ("context", text["context"]),
    )
    return _facts("Text" if report["without_original"] else "Calibration text", facts)


def _machine(report: Mapping[str, Any]) -> tuple[Block, ...]:
    machine = report["machine"] or {}
    torch = report.get("torch_device")
    facts = (
        (
            ("processor", machine.get("cpu")),
            ("cores", machine.get("cores")),
            ("memory", words.size(machine.get("memory_bytes"))),
            ("system", machine.get("os")),
            ("Python", machine.get("python")),
        )
        if machine
        else ()
    )
    devices = (("calibration ran on", report["calibration"].get("device")), ("torch ran on", torch))
    clocks = (report["bench"] or {}).get("gpu_clocks") or {}
    shown = (*facts, *_gpu(machine.get("gpu") or {}, clocks), *(row for row in devices if row[1]))
    return _facts("Machine", shown) if shown else ()


def _gpu(found: Mapping[str, Any], clocks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the benchmark's GPU is, and its clocks right behind the timed runs, for a machine's table."""
    if found:
        driver = f"driver {found['driver']}, " if found.get("driver") else ""
        yield "GPU", f"{found['name']} (compute capability {found['compute']}), {driver}CUDA {found['cuda']}"
    if found.get("memory_bytes"):
        rate = f"{found['memory_bytes_per_second'] / 1e9:,.0f} GB/s by clock and bus"
        yield "memory of the GPU", f"{words.size(found['memory_bytes'])}, {rate}"
    for name, title in (("sm_mhz", "clock of the GPU"), ("memory_mhz", "clock of its memory")):
        if name in clocks:
            yield title, "{:,} to {:,} MHz behind the runs".format(*clocks[name])
    for why, count in clocks.get("slowed_by", {}).items():
        yield f"slowed by {why}", f"{count} of {clocks['runs']} runs"


def _facts(title: str, facts: Iterable[tuple[str, Any]]) -> tuple[Block, ...]:
    """Names and values; None is a dash."""
    rows = ((name, "–" if value is None else words.listed(value)) for name, value in facts)
    return Heading(title), Table.of(("What", Column("Value", "value")), rows)
