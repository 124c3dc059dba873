"""Speed, latency, memory and size: what bench.json measured, both variants side by side.

Also compiled engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nbl_export.records.paired import FEWEST_LOADS, LEVEL_UNTIL_NARROW, describe_level, describe_ratio, exact_level
from nbl_export.records.results import describe_background
from nbl_export.report import words
from nbl_export.report.document import Block, Code, Figure, Heading, Paragraph, Section
from nbl_export.report.outcome import faster_runtime, timed
from nbl_export.report.table import Cell, Column, Table

__all__ = ["describe_threads", "engines", "intervals", "speed", "speeds"]

_VARIANTS = {"original": "original", "nbl": "NBL"}
_THROUGHPUT = Figure(
    "throughput",
    "Tokens per second, median of the rounds. Whiskers go from the slowest to the fastest round. "
    "In bold the paired ratio.",
)


def speed(report: Mapping[str, Any]) -> Section:
    """What the benchmark measured, or that it measured nothing."""
    if not report["bench"]:
        return Section("Speed", (Paragraph("Speed and memory were not measured."),))
    blocks = (_setting(report), _THROUGHPUT, *_speeds(report), *_faster(report), *_sizes(report))
    return Section("Speed", blocks)


def compared(rows: list[tuple[str, str, str, str]]) -> Table:
    """name, original, NBL and change, a row each."""
    return Table.of(("What", *Column.numbers("Original", "NBL", "Change")), rows)


def _setting(report: Mapping[str, Any]) -> Paragraph:
    bench = report["bench"]
    given = {"last": "the last token alone"}.get(report["logits"], "all tokens")
    logits = f" Both give the logits of {given}." if report["logits"] else ""
    said = list(dict.fromkeys(bench.get("arithmetic", {}).values()))  # of the original, then of NBL
    arithmetic = f" The engine {' in the original, and '.join(said)}." if said else ""
    return Paragraph(
        f"{bench['engine']} on {bench['provider']}, {describe_threads(bench)}.{arithmetic} "
        f"The two variants took turns, round by round. Speed was {describe_background(bench['background'])}.{logits}"
    )


def describe_threads(bench: Mapping[str, Any]) -> str:
    count = bench["threads"]
    return f"{count} {words.plural('thread', count)}" if count else "default threads"


def speeds(report: Mapping[str, Any], title: str = "") -> Table:
    """Tokens a second, latency, and the ratio of both decoders, a row a test."""
    columns = (
        Column("Test", "wrap"),
        *Column.numbers("Tokens/s original", "Tokens/s NBL", "Latency original", "Latency NBL", "Ratio"),
        "Verdict",
    )
    rows = []
    for test in timed(report):
        both = (test.original, test.nbl)
        rates = (words.number(row["tokens_per_second_median"] if row else None) for row in both)
        verdict = Cell.verdict(test.verdict, good="faster", bad="slower")
        said = (words.test(test.row), *rates, *map(test.latency, both))
        ratio = f"{describe_ratio(test.ratio['ratio'])} ({test.interval})" if test.ratio else "–"
        rows.append((*said, ratio, verdict))
    return Table.of(columns, rows, title)


def _speeds(report: Mapping[str, Any]) -> Iterator[Block]:
    yield speeds(report)
    yield Paragraph(
        "Tokens/s and latency are medians. Latency is the time to first token (TTFT) of a prompt, or the time per "
        "output token (TPOT) of decode. The ratio is the median over the loads of NBL tokens/s divided by original "
        "tokens/s, with its interval."
    )
    yield from _slots(report)
    for skipped in report["bench"].get("skipped") or ():
        yield Paragraph(f"Not measured: {words.test(skipped)}. {skipped['reason']}.")


def intervals(report: Mapping[str, Any]) -> Iterator[Block]:
    """How the ratios and their intervals come about; for experts."""
    if not report["ratios"]:
        return
    kinds = dict.fromkeys(ratio["interval"] for ratio in report["ratios"])
    yield Heading("Intervals of speed")
    yield Paragraph(
        f"Intervals: {', '.join(kinds)}. Both decoders are loaded anew for every round, because timings depend on "
        "where a load lies in memory. An interval is that of the sign test, which makes no assumption about the noise. "
        "If the interval contains 1, there is no clear difference. Up to eight loads the interval is the range of all "
        f"ratios. {_level(report)} Fewer than {FEWEST_LOADS} loads give no verdict. A difference is called noisy if "
        "the ends of its interval are more than a quarter apart, or if the medians of both decoders say another ratio."
    )


def _slots(report: Mapping[str, Any]) -> Iterator[Block]:
    """What a cache of fixed length does to the ratios, and what decode's bytes say at two lengths."""
    slots = report["bench"].get("slots")
    tested = [r["depth"] + r["tokens"] for r in report["rows"]]
    if not slots or not tested:
        return
    sizes = [report["variants"][variant] for variant in _VARIANTS]
    before, after = ((found["model_bytes"], found["kv_cache_bytes_per_token"]) for found in sizes)
    by_bytes = " and ".join(
        f"×{describe_ratio((before[0] + before[1] * n) / (after[0] + after[1] * n))} with {n:,} slots"
        for n in dict.fromkeys((slots, min(slots, max(tested))))
    )
    yield Paragraph(
        f"These ratios are for caches of {slots:,} slots. Attention of this engine reads all slots at each step, "
        "however few are filled. So a larger --max-seq-len makes the ratio larger. "
        f"The longest test needs {max(tested):,} slots. "
        f"The bytes of engine and caches give {by_bytes}. They count an embedding table, of which a step reads a row, "
        "and no copies of keys and values for each query head."
    )


def _faster(report: Mapping[str, Any]) -> tuple[Block, ...]:
    """A runtime whose prefill is faster."""
    found = faster_runtime(report)
    return () if found is None else (Paragraph(found[0]), Code(found[1]))


def _level(report: Mapping[str, Any]) -> str:
    """How often such an interval contains the true median."""
    if report["bench"].get("repetitions") is None:
        return (
            "The width of the intervals ended the loads. In simulations of this rule an interval contained the true "
            f"median in at least {describe_level(LEVEL_UNTIL_NARROW)} of the trials."
        )
    counts = sorted({ratio["loads"] for ratio in report["ratios"]} - {1})
    return " ".join(
        f"An interval of {n} loads contains the true median in {describe_level(exact_level(n))} of all cases."
        for n in counts
    )


def _sizes(report: Mapping[str, Any]) -> Iterator[Block]:
    rows = []
    facts = [report["variants"].get(variant, {}) for variant in _VARIANTS]
    for name, key in (
        ("Memory of the GPU", "device_memory_bytes"),
        ("Peak memory of the process", "peak_memory_bytes"),
        ("Memory of the process while decoding", "steady_memory_bytes"),
        ("KV cache in the benchmark", "kv_cache_bytes"),
        ("KV cache per token", "kv_cache_bytes_per_token"),
        ("Model on disk", "model_bytes"),
    ):
        before, after = (found.get(key) for found in facts)
        if before is None and key == "device_memory_bytes":
            continue
        rows.append((name, words.size(before), words.size(after), words.change(before, after)))
    yield Heading("Memory and size")
    yield compared(rows)


# -- compiled engines ------------------------------------------------------------------------------------------

_ATTENTION = {
    "fused": "The library had to fuse attention; which kernels it took is not known.",
    "fused in bf16": "The library had to fuse attention in bfloat16, because it has no fused kernel for fp16.",
    "decomposable": "Attention may be decomposed into matrix products, because the library has no fused kernel for it.",
}


def engines(report: Mapping[str, Any]) -> tuple[Section, ...]:
    """One section, or none if nothing was compiled."""
    if not report["engines"]:
        return ()
    before = report["engines"]["original"]
    after = report["engines"]["nbl"]

    def row(name: str, key: str, shown: Any) -> tuple[str, str, str, str]:
        return name, shown(before[key]), shown(after[key]), words.change(before[key], after[key])

    table = compared(
        [
            row("Build time", "build_seconds", words.duration),
            row("Engine on disk", "plan_bytes", words.size),
            row("KV cache per token", "cache_bytes_per_token", words.size),
            row("KV cache of all slots", "cache_bytes", words.size),
            row("Layers with a cache", "cache_layers", str),
        ]
    )
    return (Section("Engines", (Paragraph(_compiled(before)), table)),)


def _compiled(engine: Mapping[str, Any]) -> str:
    wide = any(list(p["tokens"]) == [1, 1, 2] for p in engine["profiles"])
    copies = "Decode of 1 to 2 tokens copies keys and values of all slots for each query head. " if wide else ""
    batch = f"{engine['max_batch']} {words.plural('sequence', engine['max_batch'])}"
    return (
        f"Compiled by {engine['engine']} {engine['version']} in {engine['precision']} for compute capability "
        f"{words.listed(engine['compute_capabilities'])}. "
        f"An engine takes up to {batch} of {engine['max_seq_len']:,} tokens, and prefill in chunks of "
        f"{engine['prefill_chunk']}. {_ATTENTION[engine['attention']]} {copies}"
        "The graphs were verified on a CPU, as float32 graphs of the same nodes."
    )
